"""The mean and standard deviation that an encoder's pictures were normalised with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from transformers.utils import cached_file

from haste.errors import UserError, in_one_line
from haste.teachers.families import HALF, Family, Normalisation

logger = logging.getLogger(__name__)


def load_normalisation(name: str, source: str, family: Family, num_channels: int) -> Normalisation:
    """The checkpoint's own, from its processor's file; where it has none, the family's, and a line in the log."""
    settings = _read_processor(name, source)
    if settings is None:
        logger.info("the teacher %s has no preprocessor_config.json; its family's mean and deviation are used", name)
        return _per_channel(*family.normalisation, num_channels)
    if settings.get("do_normalize") is False:
        return _per_channel(0.0, 1.0, num_channels)
    mean, std = settings.get("image_mean"), settings.get("image_std")  # absent or null: left at the default
    own = _per_channel(
        family.normalisation.mean if mean is None else mean,
        family.normalisation.std if std is None else std,
        num_channels,
    )
    if family.hub_normalisation_is_wrong and own == _per_channel(*HALF, num_channels):
        logger.info("the teacher %s comes with transformers' default mean; the one it was trained with is used", name)
        return _per_channel(*family.normalisation, num_channels)
    return own


def _read_processor(name: str, source: str) -> dict[str, Any] | None:
    """The image processor's settings; processors of pictures and text may keep them inside another file."""
    settings = _read_json(name, source, "preprocessor_config.json")
    if settings is None:
        settings = (_read_json(name, source, "processor_config.json") or {}).get("image_processor")
    return settings


def _read_json(name: str, source: str, file_name: str) -> dict[str, Any] | None:
    path = cached_file(
        source,
        file_name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        with open(path) as stream:
            return json.load(stream)
    except ValueError as error:
        raise UserError(f"the teacher {name} has a {file_name} that is no JSON: {in_one_line(error)}") from error


def _per_channel(mean: float | Sequence[float], std: float | Sequence[float], num_channels: int) -> Normalisation:
    """One value per channel; where the numbers differ, as for grey pictures, the mean over the channels."""

    def spread(value: float | Sequence[float]) -> tuple[float, ...]:
        values = (value,) if isinstance(value, (int, float)) else tuple(value)
        return values if len(values) == num_channels else (sum(values) / len(values),) * num_channels

    return Normalisation(spread(mean), spread(std))
