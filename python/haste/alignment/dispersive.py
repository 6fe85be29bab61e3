"""Dispersive Loss (arXiv 2506.09027): the images of a batch are pushed apart in a model's hidden space.

It is InfoNCE without positive pairs, of l2 distances, the variant of the public code. It needs no teacher, and unlike
alignment it stays to the end of the run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from haste.errors import UserError


def dispersive_loss(tokens: Tensor, tau: float = 1.0) -> Tensor:
    """log of the mean over all pairs (i, j) of exp(−‖z_i − z_j‖²/(τ·n)), for z_i the n numbers of image i.

    Pairs of an image with itself count, and all pairs are of this process's local batch, as in the public code, whose τ
    is 1.

    Args:
        tokens: (B, N, C), of one block; any floating-point type.
        tau: the temperature.

    Returns:
        A scalar, of at least fp32; 0 where all images are the same, else below.

    Raises:
        UserError: one image, which has no other.
    """
    if len(tokens) < 2:
        raise UserError("--batch-size must be at least 2 for each process with --disp-coeff, got 1")
    with torch.autocast(tokens.device.type, enabled=False):
        z = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).flatten(1)
        z = z - z.mean(dim=0)  # distances stay, and less cancels out below
        squares = z.square().sum(dim=1)
        distances = squares[:, None] + squares - 2 * z @ z.mT
        same = torch.eye(len(z), dtype=torch.bool, device=z.device)
        distances = distances.masked_fill(same, 0).clamp(min=0)
        return (-distances / (tau * z.shape[1])).flatten().logsumexp(0) - 2 * math.log(len(z))
