"""Between which bounds the numbers lie that `haste sample`, `haste evaluate`, `haste sweep` and a cache are given."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from haste.errors import UserError, shorten


class Bounds(NamedTuple):
    """low, high: both allowed. kind: Integral for whole numbers, Real for all; never NaN."""

    low: float
    high: float
    kind: type = Integral

    def __str__(self) -> str:
        what = "an integer" if self.kind is Integral else "a number"
        return f"{what} from {self.low:,} to {self.high:,}"


DEFAULT_STEPS = 50  # of a sampler

STEPS = Bounds(1, 10_000)
PICTURES = Bounds(1, 10_000_000)
GATE = Bounds(0, STEPS.high)
ORDER = Bounds(0, 20)  # above, a factorial and a power of a distance leave nothing of a float32
ERROR = Bounds(0, 1_000_000, Real)
TIME = Bounds(0, 1, Real)

BOUNDS: dict[str, Bounds] = {
    # the sampler
    "num_steps": STEPS,
    "cfg_scale": Bounds(1, 1000, Real),  # 1 is no guidance
    "guidance_low": TIME,
    "guidance_high": TIME,
    "global_seed": Bounds(0, 2**63 - 1),
    # a cache
    "interval": STEPS,
    "order": ORDER,
    "first_enhance": STEPS,
    "max_error": ERROR,  # 0 is none
    "gate": GATE,
    "cached_blocks": Bounds(1, 10_000),
    # how many
    "num_fid_samples": PICTURES,
    "per_proc_batch_size": Bounds(1, 1_000_000),
    "kid_subset_size": Bounds(2, PICTURES.high),
    # what a checkpoint is said to be
    "num_classes": Bounds(1, 10_000_000),
    "encoder_depth": Bounds(1, 10_000),
    "resolution": Bounds(1, 65_536),
    # a sweep
    "steps": STEPS,
    "intervals": STEPS,
    "orders": ORDER,
    "max_errors": ERROR,
    "gates": GATE,
    "repeats": Bounds(1, 10_000),
    "tolerance": Bounds(0, 1_000_000, Real),
}


def check_number(name: str, value: Any, shown: str | None = None) -> None:
    """UserError if a value is no number within the bounds that `name` has; of a tuple, if one of its values is none.

    shown: what the sentence calls it; by default the flag.
    """
    bounds = BOUNDS[name]
    for each in value if isinstance(value, tuple) else (value,):
        # No bool, which Python counts among the integers; NaN lies between no bounds.
        is_number = isinstance(each, bounds.kind) and not isinstance(each, bool)
        if not (is_number and bounds.low <= each <= bounds.high):
            raise UserError(f"{shown or '--' + name.replace('_', '-')} must be {bounds}, got {shorten(each)}")


def check_numbers(settings: Any) -> None:
    """`check_number` for every field of a dataclass that has bounds; None, where a field's default is that, passes."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in BOUNDS and not (value is None and field.default is None):
            check_number(field.name, value)
