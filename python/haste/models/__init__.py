"""Diffusion transformers."""

from haste.models.sit import SIT_MODELS, SIT_SIZES, SiT, SiTOutput, build_sit

__all__ = ["SIT_MODELS", "SIT_SIZES", "SiT", "SiTOutput", "build_sit"]
