"""The settings as flags and as a record, what they mean, and every check of them."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from caching_models import small_sit
from haste.caching import FAST, CacheConfig, enable_cache
from haste.caching.config import chosen_config
from haste.caching.schedule import describe_steps
from haste.errors import UserError
from hypothesis import given
from hypothesis import strategies as st


def test_taylor_alone_is_taylorseer_as_published():
    assert CacheConfig(cache="taylor").cache_fields() == {
        "cache": "taylor", "interval": 4, "first_enhance": 2, "order": 4, "granularity": "module"
    }  # fmt: skip


def test_records_hold_what_decides_the_images_and_no_more():
    assert CacheConfig().cache_fields() == {"cache": "none"}
    assert CacheConfig(cache="reuse").cache_fields()["order"] == 0
    assert CacheConfig(cache="newton", full_steps="0,3").cache_fields() == {
        "cache": "newton", "full_steps": "0,3", "order": 1, "granularity": "module"
    }  # fmt: skip
    assert CacheConfig(cache="delta-dit", gate=9).cache_fields() == {
        "cache": "delta-dit", "interval": 2, "first_enhance": 1, "gate": 9, "cached_blocks": None
    }  # fmt: skip
    assert CacheConfig(cache="newton", error_threshold=0.1).cache_fields()["interval"] == 10


@pytest.mark.parametrize("interval, count", [(1, 50), (3, 18), (4, 14), (5, 11), (6, 10)])
def test_fifty_steps_have_the_published_number_of_full_ones(interval, count):
    """With two full steps at the beginning, and the interval counted from the second of them."""
    assert len(CacheConfig(cache="taylor", interval=interval).planned_full_steps(50)) == count


@pytest.mark.parametrize(
    "settings, full",
    [
        ({"interval": 4, "first_enhance": 2}, [0, 1, 5, 9]),
        ({"interval": 4, "first_enhance": 1}, [0, 4, 8]),
        ({"interval": 3, "first_enhance": 3}, [0, 1, 2, 5, 8]),
        ({"interval": 2, "first_enhance": 1}, [0, 2, 4, 6, 8]),
        ({"interval": 4, "spacing": "even"}, [0, 4, 8]),
        ({"interval": 3, "spacing": "even"}, [0, 3, 5, 8]),
        ({"interval": 1, "spacing": "even"}, list(range(10))),
        ({"full_steps": "0,1,4"}, [0, 1, 4]),
        ({"error_threshold": 0.1}, None),
    ],
)
def test_full_steps_of_ten(settings, full):
    assert CacheConfig(cache="taylor", **settings).planned_full_steps(10) == full


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"interval": 3}, "--interval must be left out with --cache none"),
        ({"granularity": "model"}, "--granularity must be left out with --cache none"),
        ({"cache": "taylor", "gate": 3}, "--gate must be left out with --cache taylor"),
        ({"cache": "delta-dit", "order": 1}, "--order must be left out with --cache delta-dit"),
        ({"cache": "delta-dit", "granularity": "model"}, "--granularity must be left out with"),
        ({"cache": "taylor", "full_steps": "0,3", "interval": 3}, "--interval must be left out beside --full-steps"),
        ({"cache": "taylor", "spacing": "even", "full_steps": "0,3"}, "--spacing must be left out beside --full-steps"),
        ({"cache": "taylor", "spacing": "even", "error_threshold": 0.1}, "--spacing must be left out beside --error"),
        ({"cache": "taylor", "spacing": "even", "first_enhance": 3}, "--first-enhance must be left out beside --spac"),
        ({"cache": "delta-dit", "spacing": "even"}, "--spacing must be left out with --cache delta-dit"),
        ({"cache": "taylor", "full_steps": "0;3"}, "--full-steps must be step numbers such as .0,1,2,5,9., got .0;3"),
        *(
            ({"cache": "taylor", "full_steps": steps}, "--full-steps must be increasing step numbers that begin with 0")
            for steps in ("1,3", "0,3,2", "0,2,2")
        ),
        ({"cache": "reuse", "order": 2}, "--order must be 0 for --cache reuse, got 2"),
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
        CacheConfig(**settings)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"cache": "tayler"}, "cache must be one of 'none', 'reuse', 'taylor', .*, got 'tayler'"),
        ({"cache": "taylor", "granularity": "modules"}, "granularity must be one of 'module', .*, got 'modules'"),
        ({"cache": "taylor", "full_steps": [0, 1, 4]}, r"full_steps must be text, got \[0, 1, 4\]"),
        ({"cache": "taylor", "interval": "4"}, "interval must be an integer or nothing, got '4'"),
        (
            {"cache": "taylor", "error_threshold": float("inf")},
            "--error-threshold must be a number from 0 to 1,000,000, got inf",
        ),
    ],
)
def test_values_that_no_command_line_would_pass_on(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        CacheConfig(**settings)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"interval": 9}, "--interval must be at most the number of steps, 8, got 9"),
        ({"first_enhance": 9}, "--first-enhance must be at most the number of steps, 8, got 9"),
        ({"first_enhance": 9, "error_threshold": 0.1}, "--first-enhance must be at most the number of steps, 8, got 9"),
        ({"full_steps": "0,9"}, "--full-steps must be numbers from 0 to 7 for 8 steps, got 9"),
        ({"interval": 4, "order": 4}, "--order must be at most 2, as 3 of 8 steps are full, got 4"),
        ({"cache": "delta-dit", "gate": 9}, "--gate must be from 0 to the number of steps, 8, got 9"),
    ],
)
def test_what_a_number_of_steps_does_not_allow(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        CacheConfig(**{"cache": "taylor", **settings}).check_run(8)


def test_a_default_shrinks_to_what_the_run_allows():
    CacheConfig(cache="newton").check_run(1)
    CacheConfig(cache="newton", full_steps="0,1,2").check_run(8)
    assert CacheConfig(cache="newton", full_steps="0,1,2").resolved_order == 2
    assert FAST.fitted(50, {"interval", "order"}) == FAST.fitted(24, {"interval", "order"}) == FAST
    assert FAST.fitted(8, {"interval"}) == replace(FAST, interval=2)
    assert FAST.fitted(8, {"order"}) == replace(FAST, order=1)
    counts = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 8: 4, 10: 5, 12: 5, 20: 5, 28: 6, 50: 9}
    for num_steps, count in counts.items():
        fitted = FAST.fitted(num_steps, {"interval", "order"})
        assert len(fitted.planned_full_steps(num_steps)) == count
        fitted.check_run(num_steps)


def test_settings_that_nobody_chose_are_those_of_fast_and_give_way():
    assert chosen_config(None, {}) == (FAST, {"interval", "order"})
    assert chosen_config(None, {"order": 1}) == (replace(FAST, order=1), {"interval"})
    listed, defaults = chosen_config(None, {"full_steps": "0,1"})
    assert listed.cache_fields()["full_steps"] == "0,1" and defaults == {"order"}
    assert chosen_config(None, {"cache": "taylor"}) == (CacheConfig(cache="taylor"), set())
    assert chosen_config(CacheConfig(cache="reuse"), {"interval": 3}) == (CacheConfig(cache="reuse", interval=3), set())
    for name, value in {"error_threshold": 0.1, "first_enhance": 3}.items():
        chosen = chosen_config(None, {name: value})[0]
        assert chosen.spacing == "interval" and chosen.cache_fields()[name] == value
    with pytest.raises(UserError, match="--first-enhance must be left out beside --full-steps"):
        chosen_config(None, {"full_steps": "0,1", "first_enhance": 3})


@given(num_steps=st.integers(1, 200), interval=st.integers(2, 60))
def test_an_even_spacing_leads_from_the_first_step_to_the_last_but_one(num_steps, interval):
    steps = CacheConfig(cache="newton", spacing="even", interval=interval).planned_full_steps(num_steps)
    gaps = [after - before for before, after in pairwise(steps)]
    assert steps[0] == 0 and steps[-1] == max(0, num_steps - 2)
    assert all(1 <= gap <= interval for gap in gaps) and max(gaps, default=1) - min(gaps, default=1) <= 1
    assert len(steps) == 1 + math.ceil(max(0, num_steps - 2) / interval)  # no more than it takes


def test_an_interval_that_bounds_a_measured_one_may_be_longer_than_the_run():
    CacheConfig(cache="taylor", error_threshold=0.1, interval=50).check_run(8)


def test_more_blocks_than_the_model_has():
    with pytest.raises(UserError, match="--cached-blocks must be from 1 to the model's 4 blocks, got 5"):
        CacheConfig(cache="delta-dit", cached_blocks=5).check_depth(4)
    assert CacheConfig(cache="delta-dit").resolved_cached_blocks(28) == 21  # as published


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
        assert cached.config.cache == cache


@given(st.one_of(st.text(), st.text("0123456789,", max_size=20), st.lists(st.integers(0, 40)).map(describe_steps)))
def test_any_text_is_a_list_of_full_steps_or_gets_a_sentence(text):
    try:
        steps = CacheConfig(cache="reuse", full_steps=text).full_step_list
    except UserError as error:
        assert "--full-steps must be " in str(error) and "\n" not in str(error)
    else:
        assert describe_steps(steps) == re.sub(r"\b0+(?=\d)", "", text)
