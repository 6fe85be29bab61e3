"""Fixed 2-D sine-cosine positions (MAE, arXiv 2111.06377), as DiT and SiT use them."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(width: int, grid: int) -> Tensor:
    """Positions of a square grid of tokens, row by row.

    The first half of the channels encodes the column, the second half the row; each half is sines, then cosines,
    of the coordinate times 10000^(-i/(width/4)).

    Args:
        width: channels, a multiple of 4.
        grid: tokens per side.

    Returns:
        (grid², width), float32. Computed in double precision.
    """
    coordinate = torch.arange(grid, dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(coordinate, frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    column = axis[None, :, :].expand(grid, -1, -1)
    row = axis[:, None, :].expand(-1, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid * grid, width).float()
