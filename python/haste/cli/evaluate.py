"""Measure how far samples are from real images, and how far a cached run is from its uncached baseline.

Give exactly one of --run (every checkpoint of a run), --ckpt (one checkpoint) or --samples (images that are there).
The images of --run and --ckpt are sampled first. Of a run on the digits, every checkpoint is evaluated by FD and label
accuracy; all else gets every metric that its features and its reference allow.
"""

from __future__ import annotations

import logging

from haste.evaluation.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Evaluate, and print a table."""
    from haste.evaluation import runs

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.run is None:
        text = runs.evaluate_samples(config)
    elif runs.uses_classifier(config):
        text = runs.records_text(*runs.evaluate_by_classifier(config))
    else:
        text = runs.evaluate_run(config)
    print(f"\n{text}")
