"""Feature caching: which steps are full (schedule), how the others are forecast (forecaster), of what (adapters).

Reading order: config, schedule, forecaster, adapters, cached_model.
"""

from haste.caching.config import FAST, CacheConfig, fast_config
from haste.errors import lazily

# All that brings torch.
_LAZY = {
    "CachedModel": "cached_model",
    "cache_bytes": "cached_model",
    "check_memory": "cached_model",
    "disable_cache": "cached_model",
    "enable_cache": "cached_model",
    "make_cache": "cached_model",
}
__all__ = ["FAST", "CacheConfig", "fast_config", *_LAZY]
__getattr__ = lazily(__name__, _LAZY)
