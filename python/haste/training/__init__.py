"""Training: settings and presets, the loop, checkpoints."""
