"""Training a SiT: settings and recipes, the loop, checkpoints."""
