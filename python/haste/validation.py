"""Validation: dataclasses from the content of files, and the bounds of all numbers."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from haste.errors import UserError, in_one_line, shorten
from haste.io import MOST_CLASSES

T = TypeVar("T", bound=Any)


def build(cls: type[T], values: Any, source: str) -> T:
    """Build a dataclass from plain values, such as the content of JSON or a checkpoint; ignores unknown names.

    Fields may be int, float, str, bool, None, Path, Literal, lists, tuples and dicts of these, unions, and dataclasses
    of such fields. An int is accepted for a float, a list for a tuple, and NumPy's numbers for Python's.

    Args:
        source: names the file and its part in messages.

    Raises:
        UserError: a field is missing or of another type, or the dataclass rejects its value; names source and field.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{source} must hold named values, got {shown(values)}")
    hints = _hints(cls)  # type: ignore[arg-type]
    known = {}
    for field in fields(cls):
        if field.name in values:
            known[field.name] = check(values[field.name], hints[field.name], f"{field.name} of {source}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{source} must have {field.name}, got none")
    try:
        return cls(**known)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source} cannot be used: {in_one_line(error)}") from error


def check(value: Any, wanted: Any, name: str) -> Any:
    """Return a value of the given type, converted as in `build`; UserError for any other value."""
    if wanted is Any:
        return value
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            with suppress(UserError):
                return check(value, argument, name)
        raise _wrong_type(name, wanted, value)
    if origin is Literal:
        if not any(type(value) is type(known) and value == known for known in arguments):
            raise _wrong_type(name, wanted, value)
        return value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _check_items(value, origin, arguments, name)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        key_type, value_type = arguments
        return {
            check(key, key_type, f"a key of {name}"): check(item, value_type, f"{key!r} in {name}")
            for key, item in value.items()
        }
    if is_dataclass(wanted):
        return build(wanted, value, name)  # type: ignore[arg-type]
    if wanted is float and isinstance(value, Real) and not isinstance(value, bool):
        number: Any = value if isinstance(value, Integral) else float(value)
        if abs(number) <= _LARGEST or number in (math.inf, -math.inf):
            return float(number)
    elif wanted is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    elif wanted is Path and isinstance(value, (str, os.PathLike)):
        return Path(value)
    elif isinstance(wanted, type) and type(value) is wanted:
        return value
    raise _wrong_type(name, wanted, value)


_LARGEST = 1.7e308  # larger integers cannot be converted to float


def _wrong_type(name: str, wanted: Any, value: Any) -> UserError:
    return UserError(f"{name} must be {_type_name(wanted)}, got {shown(value)}")


def _check_items(values: Any, origin: type, arguments: tuple[Any, ...], name: str) -> Any:
    if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
        wanted = [arguments[0] if arguments else Any] * len(values)
    else:
        wanted = list(arguments)
        if len(wanted) != len(values):
            raise UserError(f"{name} must have {len(wanted)} values, got {len(values)}")
    return origin(check(item, kind, f"{name}[{n}]") for n, (item, kind) in enumerate(zip(values, wanted, strict=True)))


def check_types(settings: Any) -> None:
    """Check the type of every field of a dataclass.

    Where a field takes text, a path becomes text; where it takes a number, an int becomes a float.

    Raises:
        UserError: a value of another type, such as "batch_size must be an integer, got '8'".
    """
    for name, wanted in _hints(type(settings)).items():  # type: ignore[arg-type]
        value = getattr(settings, name)
        if isinstance(value, os.PathLike):
            object.__setattr__(settings, name, check(os.fspath(value), wanted, name))  # also of a frozen one
        elif isinstance(value, tuple) and any(each != each for each in value):
            continue  # NaN, here as below, is a float; its bounds refuse it
        elif type(value) is not wanted:
            object.__setattr__(settings, name, check(value, wanted, name))


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _type_name(wanted: Any) -> str:
    arguments = get_args(wanted)
    if get_origin(wanted) in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    names = {
        int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path", type(None): "nothing",
    }  # fmt: skip
    return names.get(wanted, getattr(wanted, "__name__", str(wanted)))


def shown(value: Any) -> str:
    """A short repr for messages; the type and the beginning of a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class's own __repr__
        return type(value).__name__
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:40]}..."


class Bounds(NamedTuple):
    """The bounds of a number. NaN is out of all bounds.

    Attributes:
        low, high: inclusive, unless open_low or open_high is set.
        kind: numbers.Integral or numbers.Real.
    """

    low: float
    high: float
    kind: Any = Integral
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        """Whether a value is a number within the bounds. A bool is not."""
        if not isinstance(value, self.kind) or isinstance(value, bool):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return bool(above and (value < self.high if self.open_high else value <= self.high))

    def __str__(self) -> str:
        what = "an integer" if self.kind is Integral else "a number"
        if not self.open_low and not self.open_high:
            return f"{what} from {self.low:,} to {self.high:,}"
        low = f"above {self.low:,} and up" if self.open_low else f"from {self.low:,}"
        return f"{what} {low} to {'below ' if self.open_high else ''}{self.high:,}"


DEFAULT_STEPS = 50  # of a sampler

STEPS = Bounds(1, 10_000)  # of a sampler
TRAINING_STEPS = Bounds(0, 10**9)
FROM_ONE = TRAINING_STEPS._replace(low=1)
IMAGES = Bounds(1, 10_000_000)
SIDE = Bounds(1, 16_384)  # pixels
GATE = Bounds(0, STEPS.high)
ORDER = Bounds(0, 20)  # higher orders overflow float32
ERROR = Bounds(0, 1_000_000, Real)
TIME = Bounds(0, 1, Real)
COEFFICIENT = Bounds(0, 1_000_000, Real)
SHARE = Bounds(0, 1, Real, open_high=True)
DEPTH = Bounds(1, 1000)
SEED = Bounds(0, 2**32 - 1)  # as for numpy

BOUNDS: dict[str, Bounds] = {
    # data and model
    "resolution": SIDE,
    "num_classes": Bounds(1, MOST_CLASSES),
    "num_workers": Bounds(0, 1024),
    "encoder_depth": DEPTH,
    "depth": Bounds(1, 200),
    "hidden_size": Bounds(4, 16_384),
    "num_heads": Bounds(1, 1024),
    "patch_size": Bounds(1, 1024),
    "projector_dim": Bounds(1, 65_536),
    "cfg_prob": SHARE,
    "entity_size": SIDE,
    "dropout": SHARE,
    # alignment
    "attn_coeff": COEFFICIENT,
    "proj_coeff": COEFFICIENT,
    "disp_coeff": COEFFICIENT,
    "disp_depth": DEPTH,
    "disp_tau": COEFFICIENT._replace(open_low=True),
    "cls_coeff": COEFFICIENT,
    "sra_coeff": COEFFICIENT,
    "block_out_t": DEPTH,
    "early_stop_point": TRAINING_STEPS._replace(low=-1),
    "ramp_start": TRAINING_STEPS,
    "probe_start": TRAINING_STEPS,
    "probe_every": FROM_ONE,
    "probe_images": FROM_ONE,
    "probe_block": DEPTH._replace(low=0),
    "probe_threshold": Bounds(-1, 1, Real),  # of a cosine
    "plateau_patience": FROM_ONE,
    "plateau_min_delta": COEFFICIENT,
    "teacher_resolution": SIDE,
    "zscore_alpha": Bounds(0, 1, Real),
    "time_shift": Bounds(0.001, 1000, Real),
    # optimisation
    "batch_size": Bounds(1, 2**20),
    "gradient_accumulation_steps": Bounds(1, 2**16),
    "max_train_steps": FROM_ONE,
    "epochs": FROM_ONE,
    "learning_rate": Bounds(0, 1000, Real, open_low=True),
    "warmup_steps": TRAINING_STEPS._replace(kind=Real),
    "decay_steps": TRAINING_STEPS._replace(kind=Real),
    "min_learning_rate": Bounds(0, 1000, Real),
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_weight_decay": Bounds(0, 1000, Real),
    "adam_epsilon": Bounds(0, 1, Real),
    "max_grad_norm": Bounds(0, 10**9, Real, open_low=True),
    "ema_decay": SHARE,
    "seed": SEED,
    # logging
    "logging_steps": FROM_ONE,
    "checkpointing_steps": FROM_ONE,
    "sampling_steps": TRAINING_STEPS,
    "evaluation_steps": TRAINING_STEPS,
    "evaluation_samples": IMAGES,
    "checkpoints_total_limit": Bounds(0, 10**9),
    "resume_step": TRAINING_STEPS,
    # the sampler
    "num_steps": STEPS,
    "guided_channels": Bounds(1, 4096),
    "stagger": GATE,
    "cfg_scale": Bounds(1, 1000, Real),
    "cls": Bounds(1, 65_536),
    "cls_cfg_scale": Bounds(0, 1000, Real),
    "guidance_low": TIME,
    "guidance_high": TIME,
    "global_seed": Bounds(0, 2**63 - 1),
    # a cache
    "interval": STEPS,
    "order": ORDER,
    "first_enhance": STEPS,
    "error_threshold": ERROR,
    "gate": GATE,
    "cached_blocks": Bounds(1, 10_000),
    # numbers of images
    "num_fid_samples": IMAGES,
    "num_images": IMAGES,
    "per_proc_batch_size": Bounds(1, 1_000_000),
    "kid_subset_size": Bounds(2, IMAGES.high),
    # a sweep
    "steps": STEPS,
    "intervals": STEPS,
    "orders": ORDER,
    "error_thresholds": ERROR,
    "gates": GATE,
    "repeats": Bounds(1, 10_000),
    "height": SIDE,
    "width": SIDE,
    "tolerance": Bounds(0, 1_000_000, Real),
}
"""The bounds of every numeric flag, beyond which something overflows or exceeds any memory."""


def check_number(name: str, value: Any, shown: str | None = None) -> None:
    """Raise UserError if a value, or one of a tuple, is out of the bounds of `name`; `shown` replaces the flag."""
    for each in value if isinstance(value, tuple) else (value,):
        if each not in BOUNDS[name]:
            flag = shown or "--" + name.replace("_", "-")
            found = shorten(repr(each) if isinstance(each, str) else each)
            raise UserError(f"{flag} must be {BOUNDS[name]}, got {found}")


def check_numbers(settings: Any) -> None:
    """`check_number` for every field of a dataclass that has bounds; None is valid if it is the default."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in BOUNDS and not (value is None and field.default is None):
            check_number(field.name, value)


def check_limits(config: Any, largest: Mapping[str, int]) -> None:
    """Raise UserError unless each of these numbers of a model's config is from 1 to its limit."""
    for name, limit in largest.items():
        value = getattr(config, name)
        if not 1 <= value <= limit:
            raise UserError(f"{name} of its model must be from 1 to {limit}, got {value}")
