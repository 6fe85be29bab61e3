"""What a skipped evaluation puts in place of a region, against the definition written out."""

from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import enable_cache

DEPTH, STEPS = 3, 6


@torch.no_grad()
def features(model, inputs) -> tuple[list, torch.Tensor]:
    """Of one full evaluation: what every block adds, and the tokens after the last one."""
    x, t, y = inputs
    tokens, c = model.embed(x, t, y)
    added = []
    for block in model.blocks:
        before, tokens = tokens, block(tokens, c)[0]
        added.append(tokens - before)
    return added, tokens


@pytest.mark.parametrize("order", [0, 1])
@torch.no_grad()
def test_what_is_forecast_of_blocks_one_by_one_and_of_the_whole_model(order):
    """Full at steps 0, 1 and 5; at 3, two steps after the last full one, F + order·2·(F − F_old)."""
    model = small_sit(DEPTH).double()
    noise, labels = small_noise(dtype=torch.float64)
    inputs = [(noise * (1 - 0.1 * s), torch.full((2,), 1 - s / STEPS).double(), labels) for s in range(STEPS)]
    (old_added, old_last), (new_added, new_last) = features(model, inputs[0]), features(model, inputs[1])
    tokens, c = model.embed(*inputs[3])

    by_block = tokens
    for old, new in zip(old_added, new_added, strict=True):
        by_block = by_block + new + order * 2 * (new - old)
    last = new_last + order * 2 * (new_last - old_last)
    for granularity, expected in (("block", by_block), ("model", last)):
        cached = enable_cache(model, num_steps=STEPS, cache="taylor", granularity=granularity, interval=4, order=order)
        answers = [cached(*each).velocity for each in inputs[:4]]
        assert cached.full_steps == [0, 1]
        torch.testing.assert_close(answers[3], model.finish(expected, c), rtol=1e-6, atol=1e-7)


def test_what_each_granularity_keeps():
    model = small_sit(DEPTH)
    kept = [enable_cache(model, cache="reuse", granularity=g).regions[0].modules for g in ("module", "block", "model")]
    assert kept == [2 * DEPTH, 1, 1]
