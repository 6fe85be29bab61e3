"""Feature caching: which steps are full (schedule), how the others are forecast (forecaster), of what (adapters).

Reading order: config, schedule, forecaster, adapters, cached_model, enable.
"""

from haste.caching.config import FAST, CacheConfig, fast_config
from haste.errors import lazily

# All that brings torch.
_LAZY = {
    "CachedModel": "cached_model",
    "cache_bytes": "enable",
    "check_memory": "enable",
    "disable_cache": "enable",
    "enable_cache": "enable",
    "make_cache": "enable",
}
__all__ = ["FAST", "CacheConfig", "fast_config", *_LAZY]
__getattr__ = lazily(__name__, _LAZY)
