"""Measure how far samples are from real images, and how far a cached run is from its uncached baseline.

Give exactly one of --run (every checkpoint of a run), --ckpt (one checkpoint) or --samples (images that are there).
The images of --run and --ckpt are sampled first. Of a run on the digits, every checkpoint is evaluated by FD and label
accuracy; all else gets every metric that its features and its reference allow.
"""

from haste.evaluation.config import EvaluateConfig as Args

__all__ = ["Args"]
