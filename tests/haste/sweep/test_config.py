from __future__ import annotations

import pytest
from haste.generation.config import SamplingConfig
from haste.sweep.config import Grid, long_name, plan, point_fields, point_key, series_name, shared_fields, short_name

BASE = SamplingConfig(labels="balanced", cfg_scale=1.5, guidance_high=0.7)
EVERYTHING = Grid(
    caches=("reuse", "taylor", "newton", "delta-dit"),
    granularities=("module", "model"),
    intervals=(3, 5),
    orders=(1, 2),
    spacings=("interval", "even"),
    error_thresholds=(0.0, 0.1),
    gates=(10, 20),
    steps=(30, 50),
)


def test_every_combination_that_means_something_is_there_once():
    points = plan(BASE, [EVERYTHING], (10, 20))
    counts = {name: sum(point.cache == name for point in points) for name in ("none", *EVERYTHING.caches)}
    # taylor: 2 granularities x 2 intervals x 2 orders x (2 spacings + 1 error) x 2 numbers of steps; reuse has no order
    # to vary, delta-dit gates in place of granularity, order, spacing and error.
    assert counts == {"none": 4, "reuse": 24, "taylor": 48, "newton": 48, "delta-dit": 8}
    assert len({point_key(point) for point in points}) == len(points)
    assert plan(BASE, [EVERYTHING, EVERYTHING], (10, 20)) == points


def test_the_longest_full_run_comes_first_and_every_cached_run_has_its_full_one():
    points = plan(BASE, [Grid(caches=("taylor",), intervals=(4,), steps=(20, 60))], (10, 20, 40))
    assert [point.num_steps for point in points if point.cache == "none"] == [60, 40, 20, 10]
    assert points[0].cache == "none" and points[0].num_steps == 60
    assert [point.num_steps for point in points if point.cache == "taylor"] == [20, 60]


def test_what_points_share_and_what_tells_them_apart_make_the_settings_again():
    for point in plan(BASE, [EVERYTHING], (10,)):
        again = SamplingConfig(**shared_fields(point), **point_fields(point))
        assert again.sampling_fields() == point.sampling_fields()
        assert shared_fields(point) == shared_fields(BASE)


def test_no_two_points_have_one_name():
    points = plan(BASE, [EVERYTHING], (10,))
    assert len({long_name(point) for point in points}) == len(points)
    of_one_length = [point for point in points if point.num_steps == 50]
    assert len({(series_name(point), short_name(point)) for point in of_one_length}) == len(of_one_length)


@pytest.mark.parametrize(
    ("settings", "series", "short"),
    [
        ({"num_steps": 20}, "uncached", "20"),
        ({"cache": "taylor", "interval": 3, "order": 2}, "Taylor per module", "3/2"),
        (
            {"cache": "newton", "granularity": "model", "error_threshold": 0.1, "interval": 8},
            "Newton per model",
            "8/4 ≤0.1",
        ),
        ({"cache": "reuse", "granularity": "block", "interval": 2}, "Reuse per block", "2"),
        ({"cache": "hermite", "interval": 2, "order": 1, "spacing": "even"}, "Hermite per module", "2/1 even"),
        ({"cache": "delta-dit", "gate": 20}, "Δ-DiT", "2, b 20"),
        ({"cache": "delta-dit", "interval": 3}, "Δ-DiT", "3"),
    ],
)
def test_names(settings, series, short):
    point = SamplingConfig(**settings)
    assert (series_name(point), short_name(point)) == (series, short)
