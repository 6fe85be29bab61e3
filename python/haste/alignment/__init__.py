"""Alignment of a student with its teachers: layers, losses, and when alignment ends."""

from haste.alignment.aligner import (
    Aligner,
    AlignmentLosses,
    LayerMap,
    alignment_losses,
    choose_encoder_depth,
    choose_layer_map,
)

__all__ = [
    "Aligner",
    "AlignmentLosses",
    "LayerMap",
    "alignment_losses",
    "choose_encoder_depth",
    "choose_layer_map",
]
