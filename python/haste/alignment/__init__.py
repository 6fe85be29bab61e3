"""What aligning a student with its teachers means: which layers, which losses, and one run's use of both."""

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
