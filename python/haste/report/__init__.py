"""Reports that people open in a browser: one self-contained HTML file each."""
