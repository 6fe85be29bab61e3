"""Layer maps, and both losses against their formulas, written out in float64."""

from __future__ import annotations

import pytest
import torch
from haste.alignment import LayerMap, alignment_losses, choose_encoder_depth, choose_layer_map
from haste.errors import UserError
from haste.teachers import TeacherOutput
from torch.nn import functional as F

BATCH, TOKENS, PREFIX = 2, 9, 3


def random_pair(heads: int, tokens: int, width: int, requires_grad: bool = False):
    return tuple(torch.randn(BATCH, heads, tokens, width, requires_grad=requires_grad) for _ in range(2))


def cross_entropy_of_maps(student, teacher) -> torch.Tensor:
    (student_q, student_k), (teacher_q, teacher_k) = student, teacher
    student_q, student_k = student_q[:, :2].double(), student_k[:, :2].double()
    teacher_q, teacher_k = teacher_q[:, :2, PREFIX:].double(), teacher_k[:, :2, PREFIX:].double()
    student_map = (student_q @ student_k.mT * student_q.shape[-1] ** -0.5).log_softmax(-1)
    teacher_map = (teacher_q @ teacher_k.mT * teacher_q.shape[-1] ** -0.5).softmax(-1)
    return -(teacher_map * student_map).sum(-1).mean()


def test_attention_loss_is_the_mean_over_pairs_of_the_cross_entropy_of_the_leading_heads():
    torch.manual_seed(0)
    student = [random_pair(4, TOKENS, 6, requires_grad=True) for _ in range(2)]
    teacher = [random_pair(2, PREFIX + TOKENS, 8) for _ in range(2)]
    losses = alignment_losses(student, [], [TeacherOutput(teacher, PREFIX, None)])
    expected = torch.stack([cross_entropy_of_maps(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
    torch.testing.assert_close(losses.attention.double(), expected, rtol=1e-5, atol=1e-6)
    assert losses.feature is None

    losses.attention.backward()
    q = student[0][0]
    assert q.grad[:, :2].abs().sum() > 0
    assert q.grad[:, 2:].abs().sum() == 0  # the student's other heads stay free


def test_feature_loss_is_the_mean_over_teachers_of_minus_the_cosine():
    torch.manual_seed(0)
    projections = [torch.randn(BATCH, TOKENS, width, requires_grad=True) for width in (5, 7)]
    teachers = [TeacherOutput([], PREFIX, torch.randn(BATCH, TOKENS, width)) for width in (5, 7)]
    losses = alignment_losses([], projections, teachers)
    cosines = [
        F.cosine_similarity(z.double(), t.patch_tokens.double(), dim=-1).mean()
        for z, t in zip(projections, teachers, strict=True)
    ]
    torch.testing.assert_close(losses.feature.double(), -sum(cosines) / 2, rtol=1e-5, atol=1e-6)
    assert losses.attention is None


def test_nothing_asked_nothing_computed():
    losses = alignment_losses([], [], [TeacherOutput([], 0, None)])
    assert losses == (None, None)


# ---- layers ----


@pytest.mark.parametrize(
    ("model", "student", "teacher"),
    [
        ("SiT-B/2", (2, 3, 4), (7, 9, 11)),
        ("SiT-L/2", (4, 5, 6, 7), (8, 9, 10, 11)),
        ("SiT-XL/2", (4, 5, 6, 7), (8, 9, 10, 11)),
    ],
)
def test_the_papers_maps(model, student, teacher):
    assert choose_layer_map("", model) == LayerMap(student, teacher)


def test_a_typed_map_is_read_and_written_back():
    layer_map = choose_layer_map("4:8, 5:9", "SiT-B/2")
    assert layer_map == LayerMap((4, 5), (8, 9))
    assert LayerMap.parse(str(layer_map)) == layer_map


@pytest.mark.parametrize("text", ["4", "4:8:9", "a:b", "4:8,", ","])
def test_a_malformed_map_is_refused(text):
    with pytest.raises(UserError, match="--layer-map must be pairs student:teacher"):
        LayerMap.parse(text)


def test_a_model_without_a_published_map_needs_one():
    with pytest.raises(UserError, match="--layer-map must be given for SiT-S/2, .* but for SiT-B, SiT-L, SiT-XL"):
        choose_layer_map("", "SiT-S/2")


def test_a_layer_that_the_student_lacks_is_refused():
    LayerMap((0, 5), (0, 1)).check_student(6)
    with pytest.raises(UserError, match="asks for layer 6 of the student, which has 6 layers"):
        LayerMap((5, 6), (0, 1)).check_student(6)


def test_the_published_encoder_depths():
    sizes = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2", "another")
    assert [choose_encoder_depth(size, 24, attention=True) for size in sizes] == [5, 5, 8, 8, 8]
    assert [choose_encoder_depth(size, 24, attention=False) for size in sizes] == [8] * 5  # REPA's own
    assert choose_encoder_depth("SiT-XL/2", 3, attention=True) == 3
