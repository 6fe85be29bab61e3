"""Feature caching: which steps are full (schedule), how the others are predicted (forecaster), of what (snapshots)."""

from haste.caching.forecaster import TaylorForecaster
from haste.caching.schedule import IntervalSchedule
from haste.caching.taylor import TaylorSeer

__all__ = ["IntervalSchedule", "TaylorForecaster", "TaylorSeer"]
