"""Carries out `haste evaluate`."""

from __future__ import annotations

import logging

from haste.evaluation import runs
from haste.evaluation.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    """Evaluate, and print a table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.run is None:
        text = runs.evaluate_samples(config)
    elif runs.uses_classifier(config):
        text = runs.records_text(*runs.evaluate_by_classifier(config))
    else:
        text = runs.evaluate_run(config)
    print(f"\n{text}")
