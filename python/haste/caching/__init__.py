"""Feature caching: which steps are full (schedule), how the others are forecast (forecaster), of what (regions).

Reading order: settings, schedule, forecaster, snapshots, transformers, regions, corrections, cached_model, build.
"""

from haste.caching.build import make_cache, unwrap, wrap
from haste.caching.cached_model import CachedModel
from haste.caching.memory import cache_bytes, check_memory
from haste.caching.settings import FAST, CacheSettings, fast_settings

__all__ = [
    "FAST",
    "CacheSettings",
    "CachedModel",
    "cache_bytes",
    "check_memory",
    "fast_settings",
    "make_cache",
    "unwrap",
    "wrap",
]
