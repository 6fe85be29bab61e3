"""Δ-DiT against its definition, and where its group changes."""

from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import enable_cache
from haste.errors import UserError
from haste.samplers import sample

DEPTH = 4


def delta(model, num_steps=None, **settings):
    return enable_cache(model, num_steps=num_steps, cache="delta-dit", **settings)


def published(model, x, y, num_steps: int, interval: int, gate: int, count: int) -> tuple[torch.Tensor, list[int]]:
    """Written out: Euler steps, Δ of the group in use, a full step every `interval` and where the group changes."""
    full, kept, group_before = [], None, None
    for step in range(num_steps):
        rear = num_steps - step > gate
        group = range(DEPTH - count, DEPTH) if rear else range(count)
        t = torch.full((len(x),), 1 - step / num_steps, dtype=x.dtype)
        tokens, c = model.embed(x, t, y)
        is_full = not full or rear != group_before or step - full[-1] == interval
        if is_full:
            full.append(step)
        for index, block in enumerate(model.blocks):
            if index not in group or is_full:
                if index == group[0]:
                    entering = tokens
                tokens = block(tokens, c)[0]
                if index == group[-1]:
                    kept = tokens - entering
            elif index == group[0]:
                tokens = tokens + kept
        group_before = rear
        x = x - model.finish(tokens, c) / num_steps
    return x, full


@pytest.mark.parametrize("interval, gate, count", [(2, 12, 3), (3, 13, 2), (4, 10, 1), (3, 0, 4), (2, 20, 3)])
@torch.no_grad()
def test_it_is_the_published_method(interval, gate, count):
    model = small_sit(DEPTH).double()
    noise, labels = small_noise(dtype=torch.float64)
    expected, full = published(model, noise, labels, 20, interval, gate, count)
    cached = delta(model, interval=interval, gate=gate, cached_blocks=count)
    torch.testing.assert_close(sample(cached, noise, labels, num_steps=20), expected, rtol=1e-6, atol=1e-6)
    assert cached.full_steps == full


def test_the_full_steps_of_the_published_setting_and_of_one_whose_group_changes_between_them():
    model = small_sit(DEPTH)
    noise, labels = small_noise()
    for settings, full in (
        ({}, list(range(0, 20, 2))),  # 20 steps, interval 2, gate 12: the change is where a full step is due anyway
        ({"interval": 3, "gate": 12}, [0, 3, 6, 8, 11, 14, 17]),
    ):
        cached = delta(model, **settings)
        sample(cached, noise, labels, num_steps=20)
        assert cached.full_steps == full


@torch.no_grad()
def test_a_skipped_step_runs_the_other_blocks_alone():
    model = small_sit(DEPTH)
    noise, labels = small_noise()
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    cached = delta(model, num_steps=4, interval=2, gate=2, cached_blocks=3)
    # the rear three are skipped first, then the front three
    for step, expected in enumerate(([0, 1, 2, 3], [0], [0, 1, 2, 3], [3])):
        ran.clear()
        cached(noise, torch.full((2,), 1 - step / 4), labels)
        assert ran == expected


def test_by_default_three_blocks_in_four_are_skipped():
    cached = delta(small_sit(DEPTH), num_steps=4)
    assert [(len(region.before), len(region.group), len(region.after)) for region in cached.regions] == [
        (1, 3, 0), (0, 3, 1)
    ]  # fmt: skip


def test_settings_that_make_no_sense():
    model = small_sit(DEPTH)
    with pytest.raises(UserError, match="--cached-blocks must be between 1 and the model's 4 blocks, got 5"):
        delta(model, cached_blocks=5)
    with pytest.raises(UserError, match="--gate must be between 0 and the number of steps, 20, got 21"):
        delta(model, gate=21, num_steps=20)
