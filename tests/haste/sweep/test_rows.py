from __future__ import annotations

import pytest
from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.sweep.config import point_fields, shared_fields
from haste.sweep.records import average, make_rows
from sweep_rows import cached_row, plain_row


def record(settings: SamplingConfig, seconds, reference_seconds, **values) -> dict:
    measured = {"flops": 1e9 * settings.num_steps, "peak_bytes": None, "cache_bytes": 0, "calls": 1, "full_calls": 1,
                "fd": 1.0, "label_accuracy": None, "psnr": None, "ssim": None}  # fmt: skip
    return {
        "sweep": {"settings": shared_fields(settings)},
        "point": point_fields(settings),
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        **measured,
        **values,
    }


FULL, SHORT = SamplingConfig(num_steps=50, labels="3"), SamplingConfig(num_steps=10, labels="3")
CACHED = SamplingConfig(labels="3", cache="newton", granularity="model", interval=4, order=2)


def test_speed_ups_are_over_the_longest_full_run_within_a_turn():
    records = [
        record(CACHED, [1.0, 2.0, 3.0], [4.0, 8.0, 9.0], flops=20e9),
        record(SHORT, [2.0], [10.0]),
        record(FULL, [4.0, 8.0, 9.0], [4.0, 8.0, 9.0]),
    ]
    full, short, cached = make_rows(records)
    assert [row.uncached for row in (full, short, cached)] == [True, True, False]
    assert (full.speedup, full.flops_speedup, full.kept) == (1.0, 1.0, 1.0)
    assert (short.speedup, short.flops_speedup) == (5.0, 5.0)
    assert (cached.seconds, cached.speedup, cached.flops_speedup, cached.kept) == (2.0, 4.0, 2.5, 1.6)
    assert cached.settings.sampling_fields() == CACHED.sampling_fields()


@pytest.mark.parametrize("records", [[], [record(CACHED, [1.0], [2.0])]])
def test_without_a_full_run_there_is_nothing_to_compare_with(records):
    with pytest.raises(UserError, match="the records hold no full run to compare with"):
        make_rows(records)


def test_sweeps_are_averaged_over_the_points_that_all_have():
    first = [plain_row(50, 1.0, label_accuracy=0.9), cached_row(4, 0.010, 2.0, 40.0), cached_row(6, 0.008, 3.0, 30.0)]
    second = [plain_row(50, 3.0, label_accuracy=0.7), cached_row(4, 0.012, 2.0, 50.0)]
    third = [plain_row(50, 2.0, label_accuracy=0.8), cached_row(4, 0.090, 2.0, 60.0)]
    full, cached = average([first, second, third])
    assert (full.fd, full.label_accuracy, full.psnr) == (2.0, pytest.approx(0.8), None)
    assert full.fd_spread == pytest.approx(1.0) and full.label_accuracy_spread == pytest.approx(0.1)
    assert (cached.seconds, cached.psnr, cached.fd_spread) == (0.012, 50.0, 0.0)  # the median, the mean
    assert cached.speedup == pytest.approx(0.05 / 0.012)
    assert cached.label_accuracy is None and cached.label_accuracy_spread is None


def test_one_sweep_has_no_spread():
    (row,) = average([[plain_row(50, 1.0)]])
    assert row == plain_row(50, 1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"flops": "x"}, "flops of a record of haste sweep must be a number, and is 'x'"),
        ({"seconds": [0.0]}, "must hold as many seconds as reference_seconds, and FLOPs, all above 0"),
        ({"seconds": [1.0, 2.0]}, "must hold as many seconds as reference_seconds"),
        ({"sweep": {}}, "settings of a record of haste sweep must be"),
        ({"point": {"num_steps": "x"}}, "num_steps of settings of a record of haste sweep must be an integer"),
    ],
)
def test_records_of_other_values_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        make_rows([{**record(FULL, [1.0], [1.0]), **change}])
