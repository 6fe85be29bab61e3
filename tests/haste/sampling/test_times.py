"""Times that know their value, as long as nobody writes to them."""

from __future__ import annotations

import torch
from haste.samplers import time_of, times_at


def test_times_know_their_value_until_they_are_written_to():
    times = times_at(0.3, 4, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(times, torch.full((4,), 0.3, dtype=torch.bfloat16)) and time_of(times) == 0.3
    for other in (times * 1000, times.clone(), times[:2], torch.full((4,), 0.3)):
        assert time_of(other) is None
    times[1:].mul_(2)
    assert time_of(times) is None


def test_in_inference_mode_too():
    with torch.inference_mode():
        assert time_of(times_at(0.25, 2, torch.float32, torch.device("cpu"))) == 0.25
