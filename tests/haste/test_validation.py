"""Dataclasses from the values of a file, and the bounds of all numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
from haste.cli.commands import PrepareConfig
from haste.cli.demo import DemoConfig
from haste.errors import UserError
from haste.evaluation.config import EvaluateConfig
from haste.generation.config import SampleConfig
from haste.sweep.config import SweepConfig
from haste.training.config import TrainConfig
from haste.validation import BOUNDS, build, check_number, check_numbers
from hypothesis import given
from hypothesis import strategies as st


@dataclass
class Inner:
    x: float


@dataclass
class Example:
    count: int
    rate: float = 0.5
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    steps: list[int] = field(default_factory=list)
    inner: Inner | None = None
    table: dict[str, int] = field(default_factory=dict)
    anything: Any = None


def test_values_of_the_right_types_are_taken_and_unknown_names_left_out():
    values = {"count": 3, "rate": 1, "pair": [1, 2], "steps": [4], "inner": {"x": 2}, "table": {"k": 1}, "other": 0}
    assert build(Example, values, "file") == Example(3, 1.0, None, "a", (1.0, 2.0), [4], Inner(2.0), {"k": 1})


@pytest.mark.parametrize(
    "values, named",
    [
        ({}, "file must have count"),
        ([], "file must hold named values"),
        ({"count": True}, "count of file must be an integer, got True"),
        ({"count": 1.0}, "count of file must be an integer"),
        ({"count": 1, "rate": "0.5"}, "rate of file must be a number"),
        ({"count": 1, "rate": 10**400}, "rate of file must be a number"),
        ({"count": 1, "rate": float("nan")}, "rate of file must be a number"),
        ({"count": 1, "name": 3}, "name of file must be text or nothing"),
        ({"count": 1, "kind": "c"}, "kind of file must be one of 'a', 'b'"),
        ({"count": 1, "pair": [1]}, "pair of file must have 2 values"),
        ({"count": 1, "steps": [1, "2"]}, r"steps of file\[1\] must be an integer"),
        ({"count": 1, "inner": {}}, "inner of file must be"),
        ({"count": 1, "table": {"k": None}}, "'k' in table of file must be an integer"),
    ],
)
def test_others_are_refused_by_name(values, named):
    with pytest.raises(UserError, match=named):
        build(Example, values, "file")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(plain | st.fixed_dictionaries({"count": plain}, optional=dict.fromkeys(("rate", "pair", "inner"), plain)))
def test_whatever_the_values_the_answer_is_a_dataclass_or_a_sentence(values):
    try:
        assert isinstance(build(Example, values, "file"), Example)
    except UserError as error:
        assert "file" in str(error)


COMMANDS = [DemoConfig, EvaluateConfig, PrepareConfig, SampleConfig, SweepConfig, TrainConfig]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_numeric_flag_has_finite_bounds(command):
    hints = get_type_hints(command)

    def takes_numbers(hint) -> bool:
        return hint in (int, float) or any(map(takes_numbers, get_args(hint)))

    numeric = [field.name for field in fields(command) if takes_numbers(hints[field.name])]
    assert len(numeric) > 2 and set(numeric) <= set(BOUNDS)
    assert all(math.isfinite(bounds.low) and math.isfinite(bounds.high) for bounds in BOUNDS.values())


@pytest.mark.parametrize("command", [SampleConfig, EvaluateConfig])
def test_the_number_of_steps_has_one_default(command):
    assert command.__dataclass_fields__["num_steps"].default == 50


def test_there_are_no_other_bounds():
    flags = {field.name for command in COMMANDS for field in fields(command)}
    assert set(BOUNDS) <= flags


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_lies_within(command):
    for setting in fields(command):
        if setting.name in BOUNDS and isinstance(setting.default, (int, float, tuple)):
            check_number(setting.name, setting.default)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bounds_themselves_pass_and_what_is_beyond_does_not(name):
    low, high, _, open_low, open_high = BOUNDS[name]
    within = [low] * (not open_low) + [high] * (not open_high)
    for value in (*within, tuple(within)):
        check_number(name, value)
    flag = "--" + name.replace("_", "-")
    beyond = [low - 1, high * 2, math.nan, math.inf, -math.inf, "1", None, True, 10**5000, [1], (*within, math.nan)]
    for value in beyond + [low] * open_low + [high] * open_high:
        with pytest.raises(UserError, match=f"{flag} must be an? [a-z]+ (from|above) .* to .*, got ") as caught:
            check_number(name, value)
        assert len(str(caught.value)) < 150


def test_whole_numbers_are_whole_and_may_be_numpys():
    check_number("num_steps", np.int64(8))
    check_number("cfg_scale", 2)
    with pytest.raises(UserError, match="steps must be an integer from 1 to 10,000, got 2.5"):
        check_number("num_steps", 2.5, shown="steps")


def test_none_passes_where_it_is_the_default_alone():
    check_numbers(SampleConfig(ckpt="a"))
    with pytest.raises(UserError, match="num_steps must be an integer, got None"):
        SampleConfig(ckpt="a", num_steps=None)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"mode": "SDE"}, "mode must be one of 'ode', 'sde', 'ddim', 'ddpm' or nothing, got 'SDE'"),
        ({"mode": 3}, "mode must be one of 'ode', 'sde', 'ddim', 'ddpm' or nothing, got 3"),
        ({"ema": "no"}, "ema must be true or false, got 'no'"),
        ({"fast": "no"}, "fast must be true or false, got 'no'"),
        ({"heun": "no"}, "heun must be true or false, got 'no'"),
        ({"convention": "x"}, "convention must be one of 'repa', 'sit', 'dit' or nothing, got 'x'"),
        ({"interval": "4"}, "interval must be an integer or nothing, got '4'"),
        ({"sample_dir": 3}, "sample_dir must be a path or nothing, got 3"),
    ],
)
def test_settings_of_another_type_are_refused_when_they_are_made(settings, named):
    with pytest.raises(UserError, match=f"^{named}$"):
        SampleConfig(ckpt="a", **settings)


def test_numbers_of_numpy_and_names_of_files_become_pythons():
    config = SampleConfig(ckpt="a", num_steps=np.int64(7), cfg_scale=np.float32(1.5), sample_dir="b")
    assert (config.ckpt, config.sample_dir) == (Path("a"), Path("b"))
    assert type(config.num_steps) is int and type(config.cfg_scale) is float


def test_text_keeps_its_quotes_where_a_number_belongs():
    with pytest.raises(UserError, match="^num_steps must be an integer from 1 to 10,000, got '4'$"):
        check_number("num_steps", "4", "num_steps")
