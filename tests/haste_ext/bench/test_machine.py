"""The least time of a case: what each pass of it takes at the measured rates."""

from __future__ import annotations

import pytest

from haste_ext.bench.machine import floor_seconds
from haste_ext.bench.operations import Phase

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
