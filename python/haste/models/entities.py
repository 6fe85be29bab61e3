"""Entities: the parts of an image that an autoregressive model makes one after the other (xAR, arXiv 2502.20388).

`Entities` says which tokens of an image belong to which entity, and in what order the sequence holds them. Training and
sampling go by it and know no kind. A sequence is entity 0's tokens, then entity 1's, and so on; the place of a token is
its number in it.

    token       each token is an entity, row by row
    cell        squares of `size` x `size` tokens, row by row
    subsample   the tokens at distances of `size` along both axes: size² coarse images
    scale       the whole image at 1/2ⁿ of its resolution, from `size` tokens along a side up to all
    image       one entity

Scales hold more tokens than the image; their last entity is the image itself.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from haste.errors import UserError

KINDS = ("token", "cell", "subsample", "scale", "image")


class Entities:
    """The layout of the tokens of one kind of images.

    Args:
        kind: one of KINDS.
        grid: tokens along a side of the image.
        size: see the module; None for half of the grid (cell) or 2 (subsample, scale). Not for token and image.
        patch_size: pixels or latents along a side of a token.

    Attributes:
        size: as resolved; of a cell, a token and an image the tokens along a side.
        sizes: tokens of each entity.
        bounds: the first place of each entity and the one after its last.
        total: places in all, N.
        prefix: places in front of the full-resolution image's.
        causal: tokens of an entity for a block-causal mask; 0 if there is one entity, or if they differ in size.

    Raises:
        UserError: a size that does not divide the grid, or that the kind does not have.
    """

    def __init__(self, kind: str, grid: int, size: int | None = None, patch_size: int = 1) -> None:
        if kind not in KINDS:
            raise UserError(f"--entity must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.grid, self.patch_size = kind, grid, patch_size
        self.size = _resolved_size(kind, grid, size)
        areas = [side * side for side in self._sides]
        self.sizes: tuple[int, ...] = tuple(areas) if kind == "scale" else (self._tokens,) * (grid**2 // self._tokens)
        ends = list(accumulate(self.sizes, initial=0))
        self.bounds: list[tuple[int, int]] = list(pairwise(ends))
        self.total = ends[-1]
        self.prefix = self.total - grid**2
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        self.causal = self.sizes[0] if self.count > 1 and len(set(self.sizes)) == 1 else 0

    @property
    def count(self) -> int:
        """Entities of an image, K."""
        return len(self.sizes)

    @property
    def _tokens(self) -> int:
        """Tokens of an entity where all have as many."""
        return (self.grid // self.size) ** 2 if self.kind == "subsample" else self.size**2

    @property
    def _sides(self) -> list[int]:
        """Tokens along a side of each scale; the grid alone for other kinds."""
        if self.kind != "scale":
            return [self.grid]
        return [self.size * 2**n for n in range((self.grid // self.size).bit_length())]

    # ---- places ----

    @cached_property
    def order(self) -> Tensor:
        """(grid²,) int64: the number, row by row, of the image's token at each place after the prefix."""
        numbers = torch.arange(self.grid**2, device="cpu").view(self.grid, self.grid)
        if self.kind == "scale":
            return numbers.flatten()
        count, size = self.grid // self.size, self.size
        if self.kind == "subsample":  # entity (i mod size, j mod size)
            return numbers.view(count, size, count, size).permute(1, 3, 0, 2).flatten()
        return numbers.view(count, size, count, size).transpose(1, 2).flatten()

    @cached_property
    def inverse(self) -> Tensor:
        """(grid²,) int64: the place, without the prefix, of each token of the image, row by row."""
        return self.order.argsort()

    @cached_property
    def coordinates(self) -> Tensor:
        """(N, 2) float64: row and column of each place, in tokens of the whole image."""
        parts = []
        for side in self._sides:
            axis = (torch.arange(side, dtype=torch.float64, device="cpu") + 0.5) * (self.grid / side) - 0.5
            parts.append(torch.cartesian_prod(axis, axis))
        parts[-1] = parts[-1][self.order]
        return torch.cat(parts)

    @cached_property
    def owner(self) -> Tensor:
        """(N,) int64: the entity of each place."""
        return torch.arange(self.count, device="cpu").repeat_interleave(torch.tensor(self.sizes, device="cpu"))

    @cached_property
    def visible(self) -> Tensor:
        """(N, N) bool: whether the query of a row sees the key of a column, of its own entity or an earlier one."""
        return self.owner[:, None] >= self.owner[None, :]

    # ---- between images and sequences ----

    def split(self, x: Tensor) -> Tensor:
        """Images (B, C, S, S) as sequences (B, N, C·patch²): of scales, means over squares."""
        sequences = []
        for side in self._sides:
            scaled = x if side == self.grid else F.adaptive_avg_pool2d(x, side * self.patch_size)
            sequences.append(self._patches(scaled))
        sequences[-1] = sequences[-1][:, self.on("order", x.device)]
        return sequences[0] if len(sequences) == 1 else torch.cat(sequences, dim=1)

    def join(self, tokens: Tensor) -> Tensor:
        """Sequences (B, N, C·patch²) as images (B, C, S, S), made of the places after the prefix."""
        grid, p = self.grid, self.patch_size
        rows = tokens[:, self.prefix :][:, self.on("inverse", tokens.device)]
        channels = rows.shape[2] // p**2
        rows = rows.reshape(len(rows), grid, grid, p, p, channels)
        return rows.permute(0, 5, 1, 3, 2, 4).reshape(len(rows), channels, grid * p, grid * p)

    def spread(self, values: Tensor) -> Tensor:
        """One value per entity (B, K, ...) as one per place (B, N, ...)."""
        return values[:, self.on("owner", values.device)]

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, S, S) to (B, tokens, patch²·C), row by row, the channels of a patch's pixels last."""
        p, batch = self.patch_size, len(x)
        rows = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, rows, p, columns, p)
        return rows.permute(0, 2, 4, 3, 5, 1).reshape(batch, x.shape[2] * x.shape[3] // p**2, p * p * x.shape[1])

    def on(self, name: str, device: torch.device) -> Tensor:
        """The table of that name on a device; copied there once, as a training step must not wait for copies."""
        if (name, device) not in self._tables:
            with torch.inference_mode(False):  # training may use it, too
                self._tables[name, device] = getattr(self, name).to(device)
        return self._tables[name, device]

    def __repr__(self) -> str:
        return f"Entities({self.kind!r}, grid={self.grid}, size={self.size}, patch_size={self.patch_size})"


def _resolved_size(kind: str, grid: int, size: int | None) -> int:
    if kind in ("token", "image"):
        only = 1 if kind == "token" else grid
        if size not in (None, only):
            raise UserError(f"--entity-size must be left out with --entity {kind}, got {size}")
        return only
    if size is None:
        size = max(grid // 2, 1) if kind == "cell" else min(2, grid)
    if size < 1 or grid % size:
        raise UserError(f"--entity-size must divide the {grid} tokens along a side of the image, got {size}")
    if kind == "scale" and (grid // size) & (grid // size - 1):
        raise UserError(f"--entity-size must be {grid} halved some times with --entity scale, got {size}")
    return size
