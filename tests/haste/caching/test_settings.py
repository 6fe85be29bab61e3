"""The settings as flags and as a record, and the way from them to a model and back."""

from __future__ import annotations

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import FAST, CacheSettings, make_cache, unwrap, wrap
from haste.caching.forecaster import NewtonForecaster
from haste.caching.regions import BlockGroup, PerModule, WholeModel
from haste.caching.schedule import AdaptiveSchedule, IntervalSchedule, ListedSchedule
from haste.errors import UserError
from haste.sampling import evaluations, sample


def test_taylor_alone_is_taylorseer_as_published():
    settings = CacheSettings(cache="taylor")
    assert settings.cache_fields() == {
        "cache": "taylor", "interval": 4, "first_enhance": 2, "order": 4, "granularity": "module"
    }  # fmt: skip
    cached = make_cache(small_sit(), settings)
    assert cached.schedule == IntervalSchedule(4, 2) and isinstance(cached.regions[0], PerModule)


def test_records_hold_what_decides_the_pictures_and_no_more():
    assert CacheSettings().cache_fields() == {"cache": "none"}
    assert CacheSettings(cache="reuse").cache_fields()["order"] == 0
    assert CacheSettings(cache="newton", full_steps="0,3").cache_fields() == {
        "cache": "newton", "full_steps": "0,3", "order": 4, "granularity": "module"
    }  # fmt: skip
    assert CacheSettings(cache="delta-dit", gate=9).cache_fields() == {
        "cache": "delta-dit", "interval": 2, "first_enhance": 1, "gate": 9, "cached_blocks": None
    }  # fmt: skip
    assert CacheSettings(cache="newton", max_error=0.1).cache_fields()["interval"] == 10


@pytest.mark.parametrize(
    "settings, schedule",
    [
        ({"interval": 3, "first_enhance": 1}, IntervalSchedule(3, 1)),
        ({"full_steps": "0,1,5"}, ListedSchedule((0, 1, 5))),
        ({"max_error": 0.1}, AdaptiveSchedule(0.1, 10, 2)),
    ],
)
def test_schedules(settings, schedule):
    assert make_cache(small_sit(), CacheSettings(cache="newton", **settings)).schedule == schedule


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"interval": 3}, "--interval is 3, which nothing uses without --cache"),
        ({"granularity": "model"}, "--granularity is model, which nothing uses without --cache"),
        ({"cache": "taylor", "gate": 3}, "--gate is 3, which nothing uses with --cache taylor"),
        ({"cache": "delta-dit", "order": 1}, "--order is 1, which nothing uses with --cache delta-dit"),
        ({"cache": "delta-dit", "granularity": "model"}, "--granularity is model, which nothing uses with"),
        ({"cache": "taylor", "full_steps": "0,3", "interval": 3}, "--interval is 3, which nothing uses beside --full"),
        ({"cache": "taylor", "full_steps": "0;3"}, "--full-steps is '0;3'; it must be step numbers such as 0,1,2,5,9"),
        ({"cache": "taylor", "full_steps": "1,3"}, "full_steps is 1,3; it must be increasing step numbers that begin"),
        ({"cache": "reuse", "order": 2}, "--order is 2; it must be 0 for --cache reuse"),
        ({"cache": "taylor", "max_error": -0.1}, "--max-error is -0.1; it must be above 0, or 0 for evenly spaced"),
        ({"cache": "taylor", "order": -1}, "order is -1; it must be at least 0"),
        ({"cache": "taylor", "interval": 0}, "interval is 0; it must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_get_a_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        make_cache(small_sit(), CacheSettings(**settings))


def test_three_lines_around_a_loop_of_ones_own():
    model = small_sit()
    x, y = small_noise()
    fast = wrap(model, num_steps=10)
    for step in range(10):
        x = x - fast(x, torch.full((2,), 1 - step / 10), y).velocity / 10
    assert unwrap(fast) is model and fast.cache_bytes == 0
    assert unwrap(model) is model
    noise, labels = small_noise()
    torch.testing.assert_close(x, sample(make_cache(model, FAST), noise, labels, num_steps=10), rtol=1e-4, atol=1e-5)


def test_a_loop_that_calls_more_than_once_a_step_hands_over_its_plan():
    model = small_sit()
    x, y = small_noise()
    fast = wrap(model, evaluations=evaluations("heun", 4), cache="newton", order=1, interval=2)
    for _ in range(7):
        fast(x, torch.ones(2), y)
    assert fast.full_steps == [0, 1, 3] and fast.num_full == 5


def test_what_wrap_takes():
    regions = [type(wrap(small_sit(), cache="reuse", granularity=g).regions[0]) for g in ("module", "block", "model")]
    assert regions == [PerModule, BlockGroup, WholeModel]
    assert isinstance(wrap(small_sit(), cache="newton", order=2).forecaster, NewtonForecaster)
    changed = wrap(small_sit(), interval=6)
    assert changed.schedule == IntervalSchedule(6, 2) and type(changed.regions[0]) is WholeModel
    with pytest.raises(UserError, match='cache is "none"; it must name a forecaster'):
        wrap(small_sit(), cache="none")
    with pytest.raises(UserError, match="the model has a cache already; unwrap it"):
        wrap(wrap(small_sit()))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"cache": "tayler"}, "--cache is tayler; it must be none, reuse, taylor, .* or delta-dit"),
        ({"cache": "taylor", "granularity": "modules"}, "--granularity is modules; it must be module, block or model"),
        ({"cache": "taylor", "full_steps": [0, 1, 4]}, "--full-steps is .0, 1, 4.; it must be text such as '0,1"),
        ({"cache": "taylor", "max_error": float("inf")}, "--max-error is inf; it must be above 0"),
    ],
)
def test_values_that_no_command_line_would_pass_on(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        wrap(small_sit(), **settings)
