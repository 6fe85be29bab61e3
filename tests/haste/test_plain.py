from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from haste.errors import UserError
from haste.validation import build
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
        ({"count": True}, "count of file must be an integer, and is True"),
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
