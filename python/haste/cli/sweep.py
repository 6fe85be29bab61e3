"""Plot the trade-off of feature caching: quality against seconds, FLOPs and memory, beside uncached runs.

Every combination of the lists is sampled from one checkpoint, evaluated and timed; the table and the plot say which
of them are worth it. What a setting cannot do is passed over with a line. A sweep that was stopped resumes where it
stopped.
"""

from __future__ import annotations

import logging

from haste.sweep.config import SweepConfig


def main(config: SweepConfig) -> None:
    """Measure what is not known yet, then plot, from the records alone."""
    from haste.sweep.measure import run_sweep

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_sweep(config)
