"""Between which bounds the numbers lie that commands, caches and samplers are given: one table for all."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from haste.errors import UserError, shorten
from haste.limits import MOST_CLASSES


class Bounds(NamedTuple):
    """Of one number: `low` and `high` are allowed, unless they are open; NaN never is.

    kind: Integral for whole numbers, Real for all.
    """

    low: float
    high: float
    kind: type = Integral
    open_low: bool = False
    open_high: bool = False

    def hold(self, value: Any) -> bool:
        """Whether a value is such a number. A bool, which Python counts among the integers, is none."""
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
ORDER = Bounds(0, 20)  # above, a factorial and a power of a distance leave nothing of a float32
ERROR = Bounds(0, 1_000_000, Real)
TIME = Bounds(0, 1, Real)
COEFFICIENT = Bounds(0, 1_000_000, Real)
SHARE = Bounds(0, 1, Real, open_high=True)
DEPTH = Bounds(1, 1000)
SEED = Bounds(0, 2**32 - 1)  # what numpy takes

BOUNDS: dict[str, Bounds] = {
    # data and model
    "resolution": SIDE,
    "num_classes": Bounds(1, MOST_CLASSES),
    "num_workers": Bounds(0, 1024),
    "encoder_depth": DEPTH,
    "projector_dim": Bounds(1, 65_536),
    "cfg_prob": SHARE,
    # alignment
    "attn_coeff": COEFFICIENT,
    "proj_coeff": COEFFICIENT,
    "early_stop_point": TRAINING_STEPS._replace(low=-1),
    "ramp_start": TRAINING_STEPS,
    "probe_start": TRAINING_STEPS,
    "probe_every": FROM_ONE,
    "probe_images": FROM_ONE,
    "probe_block": DEPTH._replace(low=0),
    "probe_threshold": Bounds(-1, 1, Real),  # as a cosine is
    "plateau_patience": FROM_ONE,
    "plateau_min_delta": COEFFICIENT,
    "teacher_resolution": SIDE,
    # optimisation
    "batch_size": Bounds(1, 2**20),
    "gradient_accumulation_steps": Bounds(1, 2**16),
    "max_train_steps": FROM_ONE,
    "epochs": FROM_ONE,
    "learning_rate": Bounds(0, 1000, Real, open_low=True),
    "warmup_steps": TRAINING_STEPS,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_weight_decay": Bounds(0, 1000, Real),
    "adam_epsilon": Bounds(0, 1, Real),
    "max_grad_norm": Bounds(0, 10**9, Real, open_low=True),
    "ema_decay": SHARE,
    "seed": SEED,
    # keeping track
    "logging_steps": FROM_ONE,
    "checkpointing_steps": FROM_ONE,
    "sampling_steps": TRAINING_STEPS,
    "keep": Bounds(0, 10**9),
    "resume_step": TRAINING_STEPS,
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
    "num_fid_samples": IMAGES,
    "num_pictures": IMAGES,
    "per_proc_batch_size": Bounds(1, 1_000_000),
    "kid_subset_size": Bounds(2, IMAGES.high),
    # a sweep
    "steps": STEPS,
    "intervals": STEPS,
    "orders": ORDER,
    "max_errors": ERROR,
    "gates": GATE,
    "repeats": Bounds(1, 10_000),
    "tolerance": Bounds(0, 1_000_000, Real),
}
"""Of every flag that takes a number. Beyond them something overflows, or nobody has the memory."""


def check_number(name: str, value: Any, shown: str | None = None) -> None:
    """UserError if a value is no number within the bounds that `name` has; of a tuple, if one of its values is none.

    shown: what the sentence calls it; by default the flag.
    """
    for each in value if isinstance(value, tuple) else (value,):
        if not BOUNDS[name].hold(each):
            flag = shown or "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {BOUNDS[name]}, got {shorten(each)}")


def check_numbers(settings: Any) -> None:
    """`check_number` for every field of a dataclass that has bounds; None, where a field's default is that, passes."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in BOUNDS and not (value is None and field.default is None):
            check_number(field.name, value)
