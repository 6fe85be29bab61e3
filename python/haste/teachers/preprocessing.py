"""The mean and standard deviation that an encoder's pictures were normalised with."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from haste.errors import UserError
from haste.plain import build
from haste.teachers.config import read_checkpoint_json
from haste.teachers.families import HALF, Family, Normalisation

logger = logging.getLogger(__name__)


def load_normalisation(name: str, source: str, family: Family, num_channels: int) -> Normalisation:
    """The checkpoint's own, from its processor's file; where it has none, the family's, and a line in the log."""
    settings = _read_processor(name, source)
    if settings is None:
        logger.info("the teacher %s has no preprocessor_config.json; its family's mean and deviation are used", name)
        return _per_channel(*family.normalisation, num_channels)
    if settings.do_normalize is False:
        return _per_channel(0.0, 1.0, num_channels)
    mean, std = settings.image_mean, settings.image_std
    own = _per_channel(
        family.normalisation.mean if mean is None else mean,
        family.normalisation.std if std is None else std,
        num_channels,
    )
    if family.hub_normalisation_is_wrong and own == _per_channel(*HALF, num_channels):
        logger.info("the teacher %s comes with transformers' default mean; the one it was trained with is used", name)
        return _per_channel(*family.normalisation, num_channels)
    return own


@dataclass(frozen=True)
class _Processor:
    """What matters here of an image processor's settings. None, or absent: left at the default."""

    do_normalize: bool | None = None
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None


def _read_processor(name: str, source: str) -> _Processor | None:
    """The image processor's settings; processors of pictures and text may keep them inside another file."""
    what = "the settings of an image processor"
    settings = read_checkpoint_json(name, source, "preprocessor_config.json", what)
    where = "preprocessor_config.json"
    if settings is None:
        where = "processor_config.json"
        settings = (read_checkpoint_json(name, source, where, what) or {}).get("image_processor")
    if settings is None:
        return None
    processor = build(_Processor, settings, f"{where} of the teacher {name}")
    for key, least in (("image_mean", -math.inf), ("image_std", 0.0)):
        value = getattr(processor, key)
        numbers = [] if value is None else [value] if isinstance(value, float) else value
        if value == [] or not all(math.isfinite(number) and number > least for number in numbers):
            what = "finite" if key == "image_mean" else "finite and above 0"
            raise UserError(f"{key} in {where} of the teacher {name} is {str(value)[:60]}; it must be {what}")
    return processor


def _per_channel(mean: float | Sequence[float], std: float | Sequence[float], num_channels: int) -> Normalisation:
    """One value per channel; where the numbers differ, as for grey pictures, the mean over the channels."""

    def spread(value: float | Sequence[float]) -> tuple[float, ...]:
        values = (value,) if isinstance(value, (int, float)) else tuple(value)
        return values if len(values) == num_channels else (sum(values) / len(values),) * num_channels

    return Normalisation(spread(mean), spread(std))
