"""Feature caching: which steps are full (schedule), how the others are forecast (forecaster), of what (adapters).

Reading order: enable, config, schedule, forecaster. Then, for models of haste's families and the public SiT and DiT,
adapters and cached_model, or parts for those whose images are made in parts; for any other model and for pipelines
discovery, seams, model_cache, clocks, cached_module and pipelines.
"""

from haste.caching.config import FAST, CacheConfig, fast_config
from haste.errors import lazily

# All that brings torch.
_LAZY = {
    "CacheReport": "report",
    "CachedModel": "cached_model",
    "CachedModule": "cached_module",
    "CachedParts": "parts",
    "CachedPipeline": "pipelines",
    "cache_bytes": "memory",
    "cached": "enable",
    "check_memory": "memory",
    "disable_cache": "enable",
    "enable_cache": "enable",
    "make_cache": "enable",
}
__all__ = ["FAST", "CacheConfig", "fast_config", *_LAZY]
__getattr__ = lazily(__name__, _LAZY)
