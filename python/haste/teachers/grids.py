"""How positions and tokens of an encoder go from one grid to another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- positions ----


def resample_positions(embeddings: nn.Module, own_grid: int, grid: int) -> None:
    """Give an encoder's `embeddings` the learned positions of another grid, once and for all.

    Bicubic with antialiasing, as timm does it and with it REPA and HASTE; transformers would do it in each forward
    pass, without. Rotary positions (DINOv3) are computed for any grid and need nothing.
    """
    if own_grid == grid:
        return
    if isinstance(getattr(embeddings, "position_embeddings", None), nn.Parameter):
        table = resample_table(embeddings.position_embeddings[0], own_grid, grid, "bicubic")
        embeddings.position_embeddings = nn.Parameter(table[None], requires_grad=False)
    elif isinstance(getattr(embeddings, "position_embedding", None), nn.Embedding):
        table = resample_table(embeddings.position_embedding.weight, own_grid, grid, "bicubic")
        embeddings.position_embedding = nn.Embedding.from_pretrained(table)
        embeddings.position_ids = torch.arange(len(table), device=table.device)[None]


@torch.no_grad()
def resample_table(table: Tensor, own_grid: int, grid: int, mode: str) -> Tensor:
    """(P + own_grid², C) to (P + grid², C): the positions of class and register tokens stay in front."""
    prefix, patches = table[: -(own_grid**2)], table[-(own_grid**2) :]
    return torch.cat([prefix, _resize(patches[None], own_grid, grid, mode)[0]])


class NaFlexPatches(nn.Module):
    """SigLIP 2 NaFlex's embeddings for square images of one size, whose positions are resampled only once.

    It takes images (B, C, H, W) where the original takes their patches, a mask and shapes.
    """

    def __init__(self, embeddings: nn.Module, grid: int) -> None:
        super().__init__()
        self.patch_size = embeddings.patch_size
        self.patch_embedding = embeddings.patch_embedding
        table = embeddings.position_embedding.weight
        positions = resample_table(table, round(len(table) ** 0.5), grid, "bilinear")  # as SigLIP 2 does it
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, images: Tensor, spatial_shapes: None = None) -> Tensor:
        return self.patch_embedding(cut_patches(images, self.patch_size)) + self.positions


def cut_patches(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) to (B, N, p·p·C), row by row, channels last in each patch."""
    patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, rows, p, columns, p)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


# ---- tokens ----


def resample_tokens(tokens: Tensor, own_grid: int, grid: int) -> Tensor:
    """(..., own_grid², C) to (..., grid², C), bilinear over the grid, with antialiasing when it gets smaller."""
    if own_grid == grid:
        return tokens
    flat = tokens.reshape(-1, own_grid**2, tokens.shape[-1])
    return _resize(flat, own_grid, grid, "bilinear").reshape(*tokens.shape[:-2], grid**2, -1)


def _resize(tokens: Tensor, own_grid: int, grid: int, mode: str) -> Tensor:
    """(B, own_grid², C) to (B, grid², C), contiguous, computed in float32."""
    maps = tokens.float().mT.unflatten(2, (own_grid, own_grid))
    maps = F.interpolate(maps, (grid, grid), mode=mode, antialias=True)
    return maps.flatten(2).mT.contiguous().to(tokens.dtype)
