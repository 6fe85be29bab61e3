"""A student's tokens on the grids of its teachers, for teachers that keep theirs (HASTE, arXiv 2505.16792).

HASTE interpolates the student's attention maps, keys then queries, and its features. Here q and k are interpolated: for
the scores q·kᵀ that is the same, as each is linear in them, and no map is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from haste.teachers.encoder import TeacherOutput
from haste.teachers.loading import resample_tokens

QueriesKeys = Sequence[tuple[Tensor, Tensor]]


def on_teachers_grids(
    queries_keys: QueriesKeys,
    features: Sequence[Tensor],
    outputs: Sequence[TeacherOutput],
    prefix: int = 0,
    order: Tensor | None = None,
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """q, k and features of a student, bilinear over the grid; gradients flow through.

    Args:
        queries_keys: (B, H, prefix + N, D) each; they get the first teacher's grid.
        features: per teacher (B, N, C); each gets its teacher's grid. A class token in front stays as it is.
        outputs: the teachers', which tell their grids.
        prefix: tokens in front of the image's, which have no place on a grid and are left out.
        order: (N,), as in `haste.alignment.Aligner.losses`; the results are row by row.

    Returns:
        q and k (B, H, M, D) and features (B, M, C), each for a teacher of M tokens.

    Raises:
        ValueError: a number of tokens that makes no square grid.
    """
    place = None if order is None else order.argsort()

    def resample(tokens: Tensor, grid: int) -> Tensor:
        rows = tokens if place is None else tokens.index_select(-2, place)
        return resample_tokens(rows, _side(rows.shape[-2]), grid)

    def resample_behind(first: int, tokens: Tensor, grid: int) -> Tensor:
        resampled = resample(tokens[:, first:], grid)
        return torch.cat([tokens[:, :first], resampled], dim=1) if first else resampled

    grids = [_grid_of(output) for output in outputs]
    behind = [int(output.class_token is not None) for output in outputs]
    pairs = [(resample(q[:, :, prefix:], grids[0]), resample(k[:, :, prefix:], grids[0])) for q, k in queries_keys]
    return pairs, [resample_behind(*each) for each in zip(behind, features, grids, strict=bool(features))]


def _grid_of(output: TeacherOutput) -> int:
    if output.patch_tokens is not None:
        return _side(output.patch_tokens.shape[1])
    return _side(output.queries_keys[0][0].shape[2] - output.prefix)


def _side(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"the image's tokens must make a square grid, got {tokens}")
    return side
