"""Feature caching: which steps are full (schedule), how the others are forecast (forecaster), of what (regions).

Reading order: settings, schedule, forecaster, snapshots, transformers, regions, corrections, cached_model, build.
"""

from haste.caching.settings import FAST, CacheSettings, fast_settings
from haste.lazily import lazily

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
# All that brings torch.
__getattr__ = lazily(
    __name__,
    {
        "CachedModel": "cached_model",
        "cache_bytes": "memory",
        "check_memory": "memory",
        "make_cache": "build",
        "unwrap": "build",
        "wrap": "build",
    },
)
