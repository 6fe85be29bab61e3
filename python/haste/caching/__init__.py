"""Feature caching: which steps are full (schedule), how the others are predicted (forecaster), of what (snapshots)."""

from __future__ import annotations

from haste.caching.forecaster import TaylorForecaster
from haste.caching.schedule import IntervalSchedule
from haste.caching.settings import CacheSettings
from haste.caching.taylor import TaylorSeer
from haste.models import SiT

__all__ = ["CacheSettings", "IntervalSchedule", "TaylorForecaster", "TaylorSeer", "make_cache"]


def make_cache(model: SiT, settings: CacheSettings) -> TaylorSeer | None:
    """The model with a cache around it; None where the settings ask for none."""
    if settings.cache == "none":
        return None
    return TaylorSeer(model, settings.resolved_interval, settings.resolved_order, settings.first_enhance)
