"""Feature caching: which steps are full (schedule), how the others are forecast (forecaster), of what (adapters).

Reading order: config, schedule, forecaster, adapters, cached_model, enable.
"""

from haste.caching.config import FAST, CacheConfig, fast_config
from haste.errors import lazily

__all__ = [
    "FAST",
    "CacheConfig",
    "CachedModel",
    "cache_bytes",
    "check_memory",
    "disable_cache",
    "enable_cache",
    "fast_config",
    "make_cache",
]
# All that brings torch.
__getattr__ = lazily(
    __name__,
    {
        "CachedModel": "cached_model",
        "cache_bytes": "enable",
        "check_memory": "enable",
        "make_cache": "enable",
        "disable_cache": "enable",
        "enable_cache": "enable",
    },
)
