"""Metrics of images: FD, KID, PRDC and Inception score in the features of a network, against real images.

Reading order: evaluator, features (inception is one network), reference, formulas. Nothing here knows a checkpoint:
`haste.evaluation` samples them and scores what they give, and `haste.training.evaluation` the model that it trains.
"""
