"""The settings as flags and as a record, and the way from them to a model and back."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch
from caching_models import small_noise, small_sit
from haste.caching import FAST, CacheConfig, disable_cache, enable_cache, make_cache
from haste.caching.adapters import BlockGroup, PerModule, WholeModel
from haste.caching.forecaster import NewtonForecaster
from haste.caching.schedule import AdaptiveSchedule, IntervalSchedule, ListedSchedule, describe_steps
from haste.errors import UserError
from haste.samplers import model_calls, sample
from hypothesis import given
from hypothesis import strategies as st


def test_taylor_alone_is_taylorseer_as_published():
    settings = CacheConfig(cache="taylor")
    assert settings.cache_fields() == {
        "cache": "taylor", "interval": 4, "first_enhance": 2, "order": 4, "granularity": "module"
    }  # fmt: skip
    cached = make_cache(small_sit(), settings)
    assert cached.schedule == IntervalSchedule(4, 2) and isinstance(cached.regions[0], PerModule)


def test_records_hold_what_decides_the_images_and_no_more():
    assert CacheConfig().cache_fields() == {"cache": "none"}
    assert CacheConfig(cache="reuse").cache_fields()["order"] == 0
    assert CacheConfig(cache="newton", full_steps="0,3").cache_fields() == {
        "cache": "newton", "full_steps": "0,3", "order": 4, "granularity": "module"
    }  # fmt: skip
    assert CacheConfig(cache="delta-dit", gate=9).cache_fields() == {
        "cache": "delta-dit", "interval": 2, "first_enhance": 1, "gate": 9, "cached_blocks": None
    }  # fmt: skip
    assert CacheConfig(cache="newton", error_threshold=0.1).cache_fields()["interval"] == 10


@pytest.mark.parametrize(
    "settings, schedule",
    [
        ({"interval": 3, "first_enhance": 1}, IntervalSchedule(3, 1)),
        ({"full_steps": "0,1,5"}, ListedSchedule((0, 1, 5))),
        ({"error_threshold": 0.1}, AdaptiveSchedule(0.1, 10, 2)),
    ],
)
def test_schedules(settings, schedule):
    assert make_cache(small_sit(), CacheConfig(cache="newton", **settings)).schedule == schedule


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"interval": 3}, "--interval is 3, which nothing uses without --cache"),
        ({"granularity": "model"}, "--granularity is model, which nothing uses without --cache"),
        ({"cache": "taylor", "gate": 3}, "--gate is 3, which nothing uses with --cache taylor"),
        ({"cache": "delta-dit", "order": 1}, "--order is 1, which nothing uses with --cache delta-dit"),
        ({"cache": "delta-dit", "granularity": "model"}, "--granularity is model, which nothing uses with"),
        ({"cache": "taylor", "full_steps": "0,3", "interval": 3}, "--interval is 3, which nothing uses beside --full"),
        ({"cache": "taylor", "full_steps": "0;3"}, "--full-steps must be step numbers such as .0,1,2,5,9., got .0;3"),
        ({"cache": "taylor", "full_steps": "1,3"}, "--full-steps must be increasing step numbers that begin with 0"),
        ({"cache": "reuse", "order": 2}, "--order is 2; it must be 0 for --cache reuse"),
        (
            {"cache": "taylor", "error_threshold": -0.1},
            "--error-threshold must be a number from 0 to 1,000,000, got -0.1",
        ),
        ({"cache": "taylor", "order": -1}, "--order must be an integer from 0 to 20, got -1"),
        ({"cache": "taylor", "interval": 0}, "--interval must be an integer from 1 to 10,000, got 0"),
    ],
)
def test_settings_that_make_no_sense_get_a_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        make_cache(small_sit(), CacheConfig(**settings))


def test_three_lines_around_a_loop_of_ones_own():
    model = small_sit()
    x, y = small_noise()
    fast = enable_cache(model, num_steps=10)
    for step in range(10):
        x = x - fast(x, torch.full((2,), 1 - step / 10), y).velocity / 10
    assert disable_cache(fast) is model and fast.cache_bytes == 0
    assert disable_cache(model) is model
    noise, labels = small_noise()
    torch.testing.assert_close(x, sample(make_cache(model, FAST), noise, labels, num_steps=10), rtol=1e-4, atol=1e-5)


def test_a_loop_that_calls_more_than_once_a_step_hands_over_its_plan():
    model = small_sit()
    x, y = small_noise()
    fast = enable_cache(model, evaluations=model_calls("heun", 4), cache="newton", order=1, interval=2)
    for time in (1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25):  # Heun's second look at a time is the next step's first
        fast(x, torch.full((2,), time), y)
    assert fast.full_steps == [0, 1, 3] and fast.num_full == 5


def test_what_wrap_takes():
    regions = [
        type(enable_cache(small_sit(), cache="reuse", granularity=g).regions[0]) for g in ("module", "block", "model")
    ]
    assert regions == [PerModule, BlockGroup, WholeModel]
    assert isinstance(enable_cache(small_sit(), cache="newton", order=2).forecaster, NewtonForecaster)
    changed = enable_cache(small_sit(), interval=6)
    assert changed.schedule == IntervalSchedule(6, 2) and type(changed.regions[0]) is WholeModel
    with pytest.raises(UserError, match='cache is "none"; it must name a forecaster'):
        enable_cache(small_sit(), cache="none")
    with pytest.raises(UserError, match="the model has a cache already; unwrap it"):
        enable_cache(enable_cache(small_sit()))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"cache": "tayler"}, "--cache must be none, reuse, taylor, .* or delta-dit, got tayler"),
        ({"cache": "taylor", "granularity": "modules"}, "--granularity must be module, block or model, got modules"),
        ({"cache": "taylor", "full_steps": [0, 1, 4]}, "--full-steps must be step numbers such as .*, got .0, 1, 4"),
        ({"cache": "taylor", "interval": "4"}, "--interval must be an integer from 1 to 10,000, got 4"),
        (
            {"cache": "taylor", "error_threshold": float("inf")},
            "--error-threshold must be a number from 0 to 1,000,000, got inf",
        ),
    ],
)
def test_values_that_no_command_line_would_pass_on(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        enable_cache(small_sit(), **settings)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.integers(-2, 9),
    st.sampled_from(["none", "taylor", "newton", "reuse", "delta-dit", "model", "0,1,3", "0,1,99999999999"]),
)  # fmt: skip
SIT = small_sit()


@given(
    cache=st.one_of(st.sampled_from(["taylor", "newton", "hermite", "reuse", "delta-dit"]), ODD),
    others=st.dictionaries(st.sampled_from([field.name for field in fields(CacheConfig)][1:]), ODD, max_size=3),
    num_steps=st.one_of(st.integers(1, 12), ODD),
)
def test_any_settings_make_a_run_or_a_sentence(cache, others, num_steps):
    try:
        cached = enable_cache(SIT, cache=cache, num_steps=num_steps, **others)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        assert cached.schedule is not None


@given(st.one_of(st.text(), st.text("0123456789,", max_size=20), st.lists(st.integers(0, 40)).map(describe_steps)))
def test_any_text_is_a_list_of_full_steps_or_gets_a_sentence(text):
    try:
        steps = CacheConfig(cache="reuse", full_steps=text).full_step_list
    except UserError as error:
        assert "--full-steps must be step numbers such as" in str(error) and "\n" not in str(error)
    else:
        assert describe_steps(steps) == re.sub(r"\b0+(?=\d)", "", text)
