"""Every number that a command takes has finite bounds, and what lies outside gets a sentence with them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import get_args, get_type_hints

import numpy as np
import pytest
from haste.cli.flags import demo, evaluate, prepare, sample, sweep, train
from haste.errors import UserError
from haste.validation import BOUNDS, check_number, check_numbers

COMMANDS = [demo, evaluate, prepare, sample, sweep, train]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_numeric_flag_has_finite_bounds(command):
    hints = get_type_hints(command.Args)

    def takes_numbers(hint) -> bool:
        return hint in (int, float) or any(map(takes_numbers, get_args(hint)))

    numeric = [field.name for field in fields(command.Args) if takes_numbers(hints[field.name])]
    assert len(numeric) > 2 and set(numeric) <= set(BOUNDS)
    assert all(math.isfinite(bounds.low) and math.isfinite(bounds.high) for bounds in BOUNDS.values())


@pytest.mark.parametrize("command", [sample, evaluate])
def test_the_number_of_steps_has_one_default(command):
    assert command.Args.__dataclass_fields__["num_steps"].default == 50


def test_there_are_no_other_bounds():
    flags = {field.name for command in COMMANDS for field in fields(command.Args)}
    assert set(BOUNDS) <= flags


@pytest.mark.parametrize("command", COMMANDS)
def test_every_default_lies_within(command):
    for field in fields(command.Args):
        if field.name in BOUNDS and isinstance(field.default, (int, float, tuple)):
            check_number(field.name, field.default)


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
    check_numbers(sample.Args(ckpt="a"))
    with pytest.raises(UserError, match="--num-steps must be an integer from 1 to 10,000, got None"):
        check_numbers(sample.Args(ckpt="a", num_steps=None))
