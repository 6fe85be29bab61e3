"""Training a SiT: settings and presets, the loop, checkpoints."""
