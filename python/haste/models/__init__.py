"""Diffusion transformers: what a family is, the registry that the rest of haste uses, and the families."""

from haste.models.family import (
    CachedBlock,
    CachedTransformer,
    CheckpointFile,
    Convention,
    Family,
    ForeignCheckpoints,
    Layout,
    ModelOutput,
    PublishedAlignment,
    SamplingCost,
    Streams,
    Weights,
)
from haste.models.mmdit import MMDiT
from haste.models.mmdit_family import MMDIT_SIZES
from haste.models.registry import (
    build_model,
    check_config,
    families,
    find_size,
    get_family,
    infer_config,
    model_depth,
    new_config,
    own_settings,
    register,
)
from haste.models.sit import SiT
from haste.models.sit_class_token import ClassTokenSiT, join, split
from haste.models.sit_family import SIT_MODELS

from haste.models.dit import DIT_MODELS, DiT  # isort: skip - after SiT, whose transformer it is
from haste.models.xar import XAR
from haste.models.xar_family import XAR_SIZES

__all__ = [
    "DIT_MODELS",
    "MMDIT_SIZES",
    "SIT_MODELS",
    "XAR",
    "XAR_SIZES",
    "CachedBlock",
    "CachedTransformer",
    "CheckpointFile",
    "ClassTokenSiT",
    "Convention",
    "DiT",
    "Family",
    "ForeignCheckpoints",
    "Layout",
    "MMDiT",
    "ModelOutput",
    "PublishedAlignment",
    "SamplingCost",
    "SiT",
    "Streams",
    "Weights",
    "build_model",
    "check_config",
    "families",
    "find_size",
    "get_family",
    "infer_config",
    "join",
    "model_depth",
    "new_config",
    "own_settings",
    "register",
    "split",
]
