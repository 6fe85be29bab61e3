"""Diffusion transformers: a file for each family, and the registry by which the rest of haste knows them."""

from haste.models.family import (
    CachedBlock,
    CachedTransformer,
    Family,
    Layout,
    ModelOutput,
    PublishedAlignment,
    build_model,
    check_config,
    families,
    find_size,
    get_family,
    infer_config,
    model_depth,
    new_config,
    register,
)
from haste.models.sit import SIT_MODELS, SiT

__all__ = [
    "SIT_MODELS",
    "CachedBlock",
    "CachedTransformer",
    "Family",
    "Layout",
    "ModelOutput",
    "PublishedAlignment",
    "SiT",
    "build_model",
    "check_config",
    "families",
    "find_size",
    "get_family",
    "infer_config",
    "model_depth",
    "new_config",
    "register",
]
