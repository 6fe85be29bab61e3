"""A student interpolated to its teacher's grid, against matrices of bilinear weights in float64."""

from __future__ import annotations

import pytest
import torch
from haste.alignment import Aligner, LayerMap
from haste.alignment.student_grid import on_teachers_grids
from haste.teachers import TeacherOutput
from small_models import save_teacher

CELLS = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # of 2 x 2 tokens on a grid of 4 x 4


def axis_weights(own: int, grid: int) -> torch.Tensor:
    """(grid, own): triangles around the centres of the new cells, wider where the grid gets smaller."""
    scale = own / grid
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) * scale - 0.5
    triangles = 1 - (torch.arange(own, dtype=torch.float64) - centres[:, None]).abs() / max(scale, 1)
    return triangles.clamp(min=0) / triangles.clamp(min=0).sum(1, keepdim=True)


def weights(own: int, grid: int) -> torch.Tensor:
    """(grid², own²), of tokens row by row."""
    return torch.kron(axis_weights(own, grid), axis_weights(own, grid))


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def teacher(grid, prefix=1, heads=3, width=5):
    q, k = drawn(2, heads, prefix + grid**2, 4), drawn(2, heads, prefix + grid**2, 4) * 1.1
    return TeacherOutput([(q, k)], prefix, drawn(2, grid**2, width))


@pytest.mark.parametrize("grid", [3, 4, 6])
@pytest.mark.parametrize(("prefix", "order"), [(0, None), (3, None), (2, CELLS)])
def test_both_losses_are_those_of_interpolated_scores_and_features(grid, prefix, order):
    q, k, features = drawn(2, 3, prefix + 16, 6), drawn(2, 3, prefix + 16, 6) * 0.9, drawn(2, 16, 5)
    target = teacher(grid)
    aligner = Aligner([_Width(5)], LayerMap((0,), (0,)), 0.5, 0.5, interpolates_student=True)
    order = None if order is None else torch.tensor(order)
    losses = aligner.losses([(q, k)], [features], [target], prefix=prefix, order=order)

    rows = torch.arange(16) if order is None else order.argsort()
    w = weights(4, grid)
    scores = (q[:, :, prefix:] @ k[:, :, prefix:].mT * 6**-0.5)[:, :, rows][:, :, :, rows]
    student = torch.log_softmax(w @ (scores @ w.T), dim=-1)  # keys, then queries, as in HASTE
    theirs = torch.softmax(target.queries_keys[0][0][:, :, 1:] @ target.queries_keys[0][1][:, :, 1:].mT / 2, dim=-1)
    torch.testing.assert_close(losses.attention, -(theirs * student).sum(-1).mean(), rtol=0, atol=1e-10)
    cosine = torch.cosine_similarity(w @ features[:, rows], target.patch_tokens, dim=2)
    torch.testing.assert_close(losses.feature.double(), -cosine.mean(), rtol=0, atol=1e-6)


class _Width(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width


@pytest.mark.parametrize("grid", [3, 6])
def test_gradients_flow_through(grid):
    def run(q, k, features):
        pairs, projected = on_teachers_grids([(q, k)], [features], [teacher(grid)], 1, torch.tensor([2, 0, 3, 1]))
        return (*pairs[0], *projected)

    inputs = [drawn(2, 2, 5, 3), drawn(2, 2, 5, 3), drawn(2, 4, 2)]
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs])


def test_each_teacher_keeps_its_grid_and_attention_has_the_firsts():
    outputs = [teacher(3), teacher(6, prefix=0)]
    pairs, features = on_teachers_grids([(drawn(2, 2, 16, 3), drawn(2, 2, 16, 3))], [drawn(2, 16, 5)] * 2, outputs)
    assert [x.shape[2] for x in pairs[0]] == [9, 9] and [x.shape[1] for x in features] == [9, 36]
    assert on_teachers_grids([], [], outputs) == ([], [])


def test_what_makes_no_grid_and_what_no_mask_fits_is_refused():
    with pytest.raises(ValueError, match="the image's tokens must make a square grid, got 15"):
        on_teachers_grids([], [drawn(2, 15, 5)], [teacher(3)])
    aligner = Aligner([_Width(5)], LayerMap((0,), (0,)), 0.5, 0.5, interpolates_student=True)
    with pytest.raises(ValueError, match="causal must be 0"):
        aligner.losses([(drawn(2, 3, 16, 6),) * 2], [drawn(2, 16, 5)], [teacher(3)], causal=4)


def test_the_teacher_keeps_its_image_size_and_it_is_said(tmp_path):
    aligner = Aligner.from_pretrained(
        str(save_teacher(tmp_path)), LayerMap((0,), (1,)), grid=6, grid_rule="interpolate-student"
    )
    assert "8 x 8 pixels, 4 x 4 tokens), to which the student's are interpolated" in aligner.describe(2)
    assert aligner.teacher_outputs(torch.rand(2, 1, 8, 8))[0].patch_tokens.shape[1] == 16
