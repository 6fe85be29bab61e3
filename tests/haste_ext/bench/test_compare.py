"""The rule that decides whether ours is timed at all."""

from __future__ import annotations

import math

import pytest
import torch

from haste_ext.bench.compare import floor_seconds, measure_accuracy
from haste_ext.bench.operations import Phase

EXACT = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)


def off_by(error: float) -> torch.Tensor:
    return (EXACT + torch.tensor([0.0, 0.0, error])).float()


def test_twice_eagers_error_passes_and_a_little_more_does_not():
    assert measure_accuracy(off_by(0.002), off_by(0.001), EXACT).passed
    accuracy = measure_accuracy(off_by(0.0021), off_by(0.001), EXACT)
    assert not accuracy.passed
    assert math.isclose(accuracy.allowed, 0.002, rel_tol=1e-3)


def test_one_rounding_of_the_largest_value_is_allowed_where_eager_is_exact():
    rounding = 4 * torch.finfo(torch.float32).eps
    assert measure_accuracy(off_by(0.9 * rounding), off_by(0.0), EXACT).passed
    assert not measure_accuracy(off_by(2.1 * rounding), off_by(0.0), EXACT).passed


def test_what_is_not_finite_does_not_pass():
    for value in (math.nan, math.inf):
        assert not measure_accuracy(off_by(value), off_by(0.001), EXACT).passed


def test_roundings_of_terms_that_cancel():
    nothing = torch.zeros(3, dtype=torch.float64)
    assert not measure_accuracy(off_by(0.0) * 1e-8, nothing.float(), nothing).passed
    assert measure_accuracy(off_by(0.0) * 1e-8, nothing.float(), nothing, terms=1.0).passed


def test_empty_results_pass():
    assert measure_accuracy(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64)).passed


RATES = {"float32": 100.0, "bfloat16": 400.0, "float16": 1.0, "float64": 50.0}
ROOFLINE = {"copy_bytes_per_second": 10.0, "matmul_flops_per_second": RATES, "exps_per_second": None}


def test_the_slowest_part_of_every_pass_counts():
    forward = Phase(bytes=20, matmul_flops=100)
    backward = Phase(bytes=20, matmul_flops=800)
    assert floor_seconds([forward], "float32", ROOFLINE) == 2.0  # memory
    assert floor_seconds([forward, backward], "float32", ROOFLINE) == 2.0 + 8.0
    assert floor_seconds([forward, backward], "bfloat16", ROOFLINE) == 2.0 + 2.0


def test_a_type_without_arithmetic_has_the_rate_of_float32():
    assert floor_seconds([Phase(bytes=0, matmul_flops=100)], "float16", ROOFLINE) == 1.0
    assert floor_seconds([Phase(bytes=0, matmul_flops=100)], "float64", ROOFLINE) == 2.0


def test_exponentials_count_where_they_were_measured():
    phase = Phase(bytes=10, matmul_flops=100, exps=60)
    assert floor_seconds([phase], "float32", ROOFLINE) == 1.0
    assert floor_seconds([phase], "float32", {**ROOFLINE, "exps_per_second": 20.0}) == pytest.approx(3.0)
