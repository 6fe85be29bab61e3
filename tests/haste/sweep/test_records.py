from __future__ import annotations

from dataclasses import replace

import pytest
from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.sweep import records as points
from haste.sweep.config import point_fields, shared_fields
from haste.sweep.records import (
    SweepDir,
    advise,
    average,
    front,
    good_enough,
    make_rows,
    recommend,
    table,
    worth_its_cache,
)
from haste.tables import markdown_table, text_table
from sweep_rows import cached_row, plain_row

SWEEP, OTHER = {"checkpoint": "0000004.pt", "samples": 70}, {"checkpoint": "0000004.pt", "samples": 80}
A, B = {"num_steps": 50, "cache": "none"}, {"num_steps": 50, "cache": "taylor", "interval": 4}


def test_what_is_kept_is_on_the_disk_and_belongs_to_its_sweep_and_point(tmp_path):
    folder = SweepDir(tmp_path)
    folder.add(SWEEP, A, fd=1.0)
    folder.add(SWEEP, A, seconds=[0.5])
    folder.add(OTHER, A, fd=3.0)
    again = SweepDir(tmp_path)
    assert again.find(SWEEP, A) == {"sweep": SWEEP, "point": A, "fd": 1.0, "seconds": [0.5]}
    assert again.find(OTHER, A)["fd"] == 3.0
    assert again.find(SWEEP, B) == {"sweep": SWEEP, "point": B}


def test_only_points_that_were_timed_are_complete_and_the_last_sweep_is_the_default(tmp_path):
    folder = SweepDir(tmp_path)
    assert folder.complete() == []
    folder.add(SWEEP, A, seconds=[0.5])
    folder.add(SWEEP, B, fd=1.0)
    assert [record["point"] for record in folder.complete(SWEEP)] == [A]
    folder.add(OTHER, B, seconds=[0.5])
    assert [record["sweep"] for record in folder.complete()] == [OTHER]


def test_a_kill_while_writing_leaves_what_was_known(tmp_path, monkeypatch):
    folder = SweepDir(tmp_path)
    folder.add(SWEEP, A, fd=1.0)

    def killed(path, write):
        raise KeyboardInterrupt

    monkeypatch.setattr(points, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.add(SWEEP, A, fd=2.0)
    assert SweepDir(tmp_path).find(SWEEP, A)["fd"] == 1.0


@pytest.mark.parametrize("line", [b'{"step": 3}', b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_holds_other_lines_is_refused(tmp_path, line):
    path = tmp_path / "sweep.jsonl"
    path.write_bytes(b'{"sweep": {}, "point": {}}\n' + line)
    with pytest.raises(UserError, match=r"line 2 of .*sweep\.jsonl must be a record of haste sweep, "):
        SweepDir(tmp_path)


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
    with pytest.raises(UserError, match="must hold an uncached run"):
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
        ({"flops": "x"}, "flops of a record of haste sweep must be a number, got 'x'"),
        ({"seconds": [0.0]}, "must hold as many seconds as reference_seconds, and FLOPs, all above 0"),
        ({"seconds": [1.0, 2.0]}, "must hold as many seconds as reference_seconds"),
        ({"sweep": {}}, "settings of a record of haste sweep must be"),
        ({"point": {"num_steps": "x"}}, "num_steps of settings of a record of haste sweep must be an integer"),
    ],
)
def test_records_of_other_values_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        make_rows([{**record(FULL, [1.0], [1.0]), **change}])


ROWS = [
    plain_row(50, 2.0, label_accuracy=0.95, label_accuracy_spread=0.004, fd_spread=0.1),
    cached_row(4, 0.015, 2.5, 41.25, label_accuracy=0.9, cache_bytes=3 * 2**19, peak_bytes=None),
]


def test_markdown_has_a_row_per_point_and_every_number():
    head, ruler, full, cached = markdown_table(table(ROWS)).splitlines()
    assert head.count("|") == ruler.count("|") == full.count("|") == cached.count("|")
    cells = dict(zip(head.split("|"), cached.split("|"), strict=True))
    assert {name.strip(): value.strip() for name, value in cells.items() if name} == {
        "setting": "Taylor per module, interval 4, order 1, 50 steps",
        "full": "13/50",
        "ms/image": "15.00",
        "speed-up": "3.33×",
        "GFLOPs": "13.00",
        "FLOPs speed-up": "3.85×",
        "kept": "0.87",
        "cache MiB": "1.5",
        "peak MiB": "–",
        "FD": "2.500",
        "label accuracy %": "90.0",
        "PSNR dB": "41.2",
        "SSIM": "0.900",
    }
    assert "| 2.000 ± 0.100 | 95.0 ± 0.4 |" in full


def test_columns_of_which_nothing_is_known_are_left_out():
    text = markdown_table(table([plain_row(50, 2.0, peak_bytes=None)]))
    for name in ("label_accuracy", "PSNR", "SSIM", "peak"):
        assert name not in text


def test_the_terminals_columns_are_aligned():
    lines = text_table(table(ROWS)).splitlines()
    assert len({len(line) for line in lines}) == 1
    end = lines[0].index("ms/image") + len("ms/image")
    assert all(line[end : end + 2] == "  " for line in lines)


FULL_ROW = plain_row(50, 2.0, label_accuracy=0.95)
PLAIN = [FULL_ROW, plain_row(25, 2.05, 40.0, label_accuracy=0.95), plain_row(10, 2.6, 30.0, label_accuracy=0.93)]


def fd(row):
    return row.fd


def test_the_front_is_what_nothing_is_faster_and_better_than():
    beaten = cached_row(3, 0.030, 2.08)
    better = cached_row(4, 0.020, 2.02)
    fast = cached_row(6, 0.005, 3.0)
    assert front([*PLAIN, beaten, better, fast], fd) == [fast, PLAIN[2], better, FULL_ROW]
    slower = replace(better, seconds=0.021)
    assert slower not in front([*PLAIN, better, slower], fd)


def test_good_enough_means_distance_and_accuracy():
    assert good_enough(cached_row(4, 0.01, 2.1, label_accuracy=0.94), FULL_ROW, 0.05)
    assert not good_enough(cached_row(4, 0.01, 2.11, label_accuracy=0.95), FULL_ROW, 0.05)
    assert not good_enough(cached_row(4, 0.01, 2.0, label_accuracy=0.93), FULL_ROW, 0.05)
    assert good_enough(cached_row(4, 0.01, 2.0, label_accuracy=None), FULL_ROW, 0.0)


def test_a_cache_is_worth_it_if_plain_runs_that_are_as_fast_agree_less():
    assert worth_its_cache(cached_row(4, 0.025, 2.0, 41.0), PLAIN)
    assert not worth_its_cache(cached_row(4, 0.025, 2.0, 39.0), PLAIN)
    assert worth_its_cache(cached_row(4, 0.024, 2.0, 39.0), PLAIN)  # the 25 uncached steps are slower
    assert not worth_its_cache(cached_row(4, 0.012, 2.0, 29.0), PLAIN)
    assert worth_its_cache(cached_row(4, 0.025, 2.0, None), PLAIN)


def test_the_fastest_that_is_good_enough_and_worth_it_is_recommended():
    poor = cached_row(6, 0.008, 2.5, 45.0, label_accuracy=0.95)
    outdone = cached_row(5, 0.011, 2.0, 25.0, label_accuracy=0.95)
    fast = cached_row(4, 0.0150, 2.0, 45.0, label_accuracy=0.95)
    as_fast_and_closer = cached_row(4, 0.0155, 2.0, 50.0, label_accuracy=0.95, order=2)
    slower_and_closer = cached_row(3, 0.020, 2.0, 60.0, label_accuracy=0.95)
    rows = [*PLAIN, poor, outdone, fast, slower_and_closer]
    assert recommend(rows, 0.05) is fast
    assert recommend([*rows, as_fast_and_closer], 0.05) is as_fast_and_closer
    assert recommend([*PLAIN, poor, outdone], 0.05) is None


def test_the_advice_says_what_plain_sampling_does_as_well():
    good = cached_row(4, 0.015, 2.0, 45.0, label_accuracy=0.95)
    words = advise([*PLAIN, good], 0.05)
    assert "Pareto front of seconds and FD, fastest first: Taylor per module, interval 4, order 1" in words
    assert "Recommended" in words and "(3.33× as fast, FD 2, 45.0 dB)" in words
    assert "The fastest uncached run with such an FD: 25 uncached steps (2.00× as fast, FD 2.05, 40.0 dB)" in words

    words = advise([*PLAIN, cached_row(4, 0.030, 2.2, 20.0)], 0.05)
    assert "No cached setting is on the Pareto front of seconds and FD." in words
    assert "No cached setting has an FD within 5% of 2" in words
