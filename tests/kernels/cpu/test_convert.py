"""Half-precision numbers in and out of every isa: each of the 65,536 exactly, and every kind of rounding.

taylor_extrapolate with one snapshot of weight 1 is a conversion.
"""

from __future__ import annotations

import pytest
import torch

import haste_ext

ONE = torch.ones(1)
HALF_TYPES = (torch.float16, torch.bfloat16)


def assert_same_numbers(out, expected):
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("working", (torch.float32, torch.float64))
def test_every_number_is_read_exactly(isa, dtype, working):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    residual = torch.zeros(1, 64, 1024, dtype=working)
    out = haste_ext.taylor_extrapolate(numbers.view(1, 1, 64, 1024), ONE, residual)
    assert_same_numbers(out.flatten(), numbers.to(working))


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_every_rounding_is_to_nearest_even(isa, dtype):
    """Each number of the type, the middle between it and the next one, and the floats on both sides of either."""
    numbers = torch.arange(2**15, dtype=torch.int16).view(dtype)
    exact = numbers[numbers.isfinite()].double()
    middles = (exact[:-1] + exact[1:]) / 2
    limit = exact[-1] + (exact[-1] - exact[-2]) / 2  # from here on the nearest is infinity
    points = torch.cat([exact, middles, limit.view(1), torch.tensor([float("inf"), float("nan")])]).float()
    infinity = torch.full_like(points, float("inf"))
    points = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])
    points = torch.cat([points, -points])
    out = haste_ext.taylor_extrapolate(points.view(1, 1, 1, -1), ONE, torch.zeros(1, 1, points.numel(), dtype=dtype))
    assert_same_numbers(out.flatten(), points.to(dtype))
