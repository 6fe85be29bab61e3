"""What of each transformer class of diffusers can be cached: the table of docs/caching.md.

    python benchmarks/diffusers_caching/classes.py > table.md

Tiny instances with random weights; a granularity counts if a few steps run with forecasts that are finite.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch
from haste import UserError, disable_cache, enable_cache

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from zoo import CLASSES, sample, tensors, tiny_call, tiny_model  # noqa: E402

COLUMNS = {
    "output": {"cache": "newton", "granularity": "output", "order": 1},
    "model": {"cache": "newton", "granularity": "model", "order": 1},
    "block": {"cache": "newton", "granularity": "block", "order": 1},
    "module": {"cache": "newton", "granularity": "module", "order": 1},
    "Δ-DiT": {"cache": "delta-dit"},
}
STEPS = 6


def cell(name: str, settings: dict) -> tuple[str, str]:
    """Whether it works, and what is cached."""
    model, call = tiny_model(name), tiny_call(name)
    try:
        fast = enable_cache(model, num_steps=STEPS, interval=3, **settings)
        answers = sample(fast, call, STEPS)
    except UserError:
        return "–", ""
    report = fast.report
    disable_cache(fast)
    finite = all(tensor.isfinite().all() for answer in answers for tensor in tensors(answer))
    return ("yes" if finite and report.forecast_calls else "wrong"), report.cached


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"| class | {' | '.join(COLUMNS)} | cached per module |\n|---|{'---|' * len(COLUMNS)}---|")
    for name in sorted(CLASSES):
        try:
            cells = {column: cell(name, settings) for column, settings in COLUMNS.items()}
        except (ImportError, NameError, KeyError) as error:  # of diffusers itself, for a package that is missing
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        made = " | ".join(works for works, _ in cells.values())
        print(f"| {name} | {made} | {cells['module'][1].partition(' (')[0]} |", flush=True)


if __name__ == "__main__":
    main()
