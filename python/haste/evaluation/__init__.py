"""Evaluation of samples: FD, KID, PRDC and Inception score in the features of a network, and fidelity to a baseline.

Reading order: evaluate, features, reference, metrics; fidelity; runs, which is `haste evaluate`.
"""
