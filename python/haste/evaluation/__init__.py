"""Evaluation of samples and checkpoints by the metrics of `haste.metrics`, and fidelity to a baseline.

Reading order: evaluate; checkpoints; fidelity, clip; runs, which is `haste evaluate`.
"""
