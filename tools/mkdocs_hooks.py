"""Links that leave docs/: right in the repository, and put right for the site, which holds docs/ and the plots."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
IMAGE = re.compile(r"!\[([^\]]*)\]\(\.\./(benchmarks/[^)]+\.png)\)")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_files(files, config):
    """Take the plots of benchmarks/ into the site."""
    for path in sorted(ROOT.glob("benchmarks/**/*.png")):
        files.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Show plots from the site, and what else lies outside docs/ by its path."""
    return LINK.sub(r"\1 (`\2`)", IMAGE.sub(r"![\1](\2)", markdown))
