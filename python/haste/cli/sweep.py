"""Draw the trade-off of feature caching: quality against seconds, FLOPs and memory, beside plain runs of fewer steps.

Every combination of the lists is drawn from one checkpoint, judged and timed; the table and the plot say which of them
are worth it. What a setting cannot do is passed over with a line. A sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import logging

from haste.sweep.config import SweepConfig


def main(config: SweepConfig) -> None:
    """Measure what is not known yet, then plot, from the records alone."""
    from haste.sweep.run import run_sweep

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_sweep(config)
