"""Layer maps, and both losses against their formulas, written out in float64."""

from __future__ import annotations

import pytest
import torch
from haste.alignment import Aligner, LayerMap, alignment_losses, choose_encoder_depth, choose_layer_map
from haste.alignment.aligner import attention_loss
from haste.errors import UserError
from haste.models import SiT
from haste.teachers import TeacherOutput
from small_models import save_teacher
from torch import nn
from torch.nn import functional as F


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two teachers of different width."""
    paths = [save_teacher(tmp_path_factory.mktemp(f"width{n}"), seed=n, hidden_size=n) for n in (16, 24)]
    return [str(path) for path in paths]


def student(z_dims, num_heads=2):
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10}
    torch.manual_seed(0)
    return SiT(**sizes, hidden_size=16, depth=3, num_heads=num_heads, encoder_depth=2, z_dims=z_dims, projector_dim=8)


def run(aligner, num_heads=2):
    images, t, labels = torch.rand(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])
    model = student(aligner.z_dims, num_heads)
    return model, aligner(model(images, t, labels, aligner.student_layers, aligner.project), images)


def test_haste_is_the_weighted_sum_and_reaches_the_student_alone(folders):
    aligner = Aligner.from_pretrained(folders[:1], LayerMap((0, 1), (1, 2)), grid=4, proj_coeff=0.25, attn_coeff=2.0)
    model, (total, losses) = run(aligner)
    torch.testing.assert_close(total, 0.25 * losses.feature + 2.0 * losses.attention)
    total.backward()
    # At initialisation the gates are shut, but q and k of the aligned layers hear the loss directly.
    assert model.blocks[1].attn.qkv.weight.grad[:32].abs().sum() > 0
    assert model.blocks[1].attn.qkv.weight.grad[32:].abs().sum() == 0
    assert all(parameter.grad is None for parameter in aligner.parameters())


def test_repa_needs_no_queries_and_keys(folders):
    aligner = Aligner.from_pretrained(folders, None, grid=4, proj_coeff=0.5, attn_coeff=0.0)
    assert aligner.student_layers == ()
    assert aligner.z_dims == (16, 24)
    _, (total, losses) = run(aligner)
    assert losses.attention is None
    torch.testing.assert_close(total, 0.5 * losses.feature)


def test_attention_alone_loads_one_teacher_and_no_later_layers(folders):
    aligner = Aligner.from_pretrained(folders, LayerMap((0,), (1,)), grid=4, proj_coeff=0.0, attn_coeff=0.5)
    assert len(aligner.teachers) == 1
    assert len(aligner.teachers[0].encoder.encoder.layer) == 2
    assert aligner.z_dims == () and not aligner.project
    _, (total, losses) = run(aligner)
    assert losses.feature is None
    torch.testing.assert_close(total, 0.5 * losses.attention)


@pytest.mark.parametrize(
    ("num_heads", "heads"),
    [
        (1, "the first 1 heads, of 2 that the teacher has, are aligned"),
        (2, "all 2 heads are aligned"),
        (4, "the first 2 heads, of 4 that the student has, are aligned"),
    ],
)
def test_the_leading_heads_are_aligned_and_it_is_said(folders, num_heads, heads):
    aligner = Aligner.from_pretrained(folders[:1], LayerMap((0,), (1,)), grid=4, proj_coeff=0.0, attn_coeff=1.0)
    assert aligner.describe(num_heads) == f"{folders[0]} (8 x 8 pixels, 4 x 4 tokens); {heads}"
    model, (total, _) = run(aligner, num_heads)
    total.backward()
    # The rows of the projection are q, then k, then v; within each, head after head.
    gradient = model.blocks[0].attn.qkv.weight.grad.view(3, num_heads, -1)
    learns = gradient.abs().sum(-1) > 0
    assert learns.tolist() == [[head < 2 for head in range(num_heads)]] * 2 + [[False] * num_heads]


def test_describe_names_every_teacher_and_no_heads_without_attention(folders):
    aligner = Aligner.from_pretrained(folders, None, grid=4, proj_coeff=1.0, attn_coeff=0.0)
    assert aligner.describe(4) == ", ".join(f"{folder} (8 x 8 pixels, 4 x 4 tokens)" for folder in folders)


def test_a_teacher_on_another_grid_is_interpolated_to_the_students(folders):
    settings = {"grid": 4, "proj_coeff": 0.5, "attn_coeff": 0.5, "image_size": 12}
    aligner = Aligner.from_pretrained(folders, LayerMap((0,), (1,)), **settings, grid_rule="interpolate")
    assert "12 x 12 pixels, 6 x 6 tokens interpolated to 4 x 4" in aligner.describe(2)
    model, (total, losses) = run(aligner)
    images = torch.rand(2, 1, 8, 8)
    assert [output.patch_tokens.shape[1] for output in aligner.teacher_outputs(images)] == [16, 16]
    total.backward()
    assert model.blocks[0].attn.qkv.weight.grad[:32].abs().sum() > 0
    with pytest.raises(UserError, match="--teacher-resolution must be .* 4 x 4 tokens, got .* 6 x 6"):
        Aligner.from_pretrained(folders, LayerMap((0,), (1,)), **settings)


class Foreign(nn.Module):
    """A model that haste knows nothing of: a token of text in front, and heads of another width."""

    def __init__(self, z_dims) -> None:
        super().__init__()
        self.patches = nn.Linear(4, 12)
        self.text = nn.Parameter(torch.randn(1, 1, 12))
        self.layers = nn.ModuleList(nn.Linear(12, 2 * 3 * 4) for _ in range(2))
        self.projectors = nn.ModuleList(nn.Linear(12, width) for width in z_dims)

    def forward(self, images):
        patches = images.unflatten(3, (4, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens = torch.cat([self.text.expand(len(images), -1, -1), self.patches(patches)], dim=1)
        pairs = [layer(tokens).unflatten(2, (2, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0) for layer in self.layers]
        return pairs, [projector(tokens[:, 1:]) for projector in self.projectors]


def test_a_trainer_of_ones_own_aligns_a_model_that_haste_does_not_know(folders):
    torch.manual_seed(0)
    aligner = Aligner.from_pretrained(folders, layer_map="0:1,1:2", grid=4)
    model, images = Foreign(aligner.z_dims), torch.rand(6, 1, 8, 8) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    outputs, totals = aligner.teacher_outputs(images), []
    for _ in range(30):
        pairs, features = model(images)
        losses = aligner.losses(pairs, features, outputs, prefix=1)
        totals.append((losses.attention.item(), losses.feature.item()))
        optimizer.zero_grad()
        aligner.weigh(losses).backward()
        optimizer.step()
    assert totals[-1][0] < totals[0][0] and totals[-1][1] < totals[0][1] - 0.3
    (q, k), output = pairs[0], outputs[0]
    teacher_q, teacher_k = (x[:, :, output.prefix :] for x in output.queries_keys[0])
    student_map, teacher_map = (
        (a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) for a, b in ((q[:, :2, 1:], k[:, :2, 1:]), (teacher_q, teacher_k))
    )
    first = aligner.losses(pairs, features, outputs, prefix=1).attention
    second = attention_loss(pairs[1:], TeacherOutput(output.queries_keys[1:], output.prefix, None), prefix=1)
    torch.testing.assert_close(2 * first - second, -(teacher_map * student_map.log()).sum(-1).mean())


def test_other_numbers_of_layers_or_features_than_the_aligner_needs(folders):
    aligner = Aligner.from_pretrained(folders[0], "0:1", 4)
    outputs = aligner.teacher_outputs(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match="queries_keys must have a pair for each of the layers .0,., got 0 pairs"):
        aligner.losses([], [torch.rand(2, 16, 16)], outputs)
    with pytest.raises(ValueError, match="features must have an entry for each of 1 teachers, got 0"):
        aligner.losses(outputs[0].queries_keys, [], outputs)


def test_a_loss_of_weight_0_needs_nothing(folders):
    aligner = Aligner.from_pretrained(folders[0], "0:1", 4, attn_coeff=0.0)
    assert aligner.student_layers == () and aligner.teachers[0].layers == ()
    with pytest.raises(ValueError, match="must return layers or features"):
        Aligner.from_pretrained(folders[0], None, 4, proj_coeff=0.0)


def test_images_of_integers_are_refused(folders):
    aligner = Aligner.from_pretrained(folders[:1], grid=4, attn_coeff=0.0)
    with pytest.raises(ValueError, match="images must be of a floating-point type, .* got torch.uint8"):
        aligner.teacher_outputs(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


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
    assert losses == (None, None, None)


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
    with pytest.raises(UserError, match="^--layer-map must be pairs student:teacher"):
        choose_layer_map(text, "SiT-B/2")
    with pytest.raises(UserError, match="^layer_map must be pairs student:teacher"):
        LayerMap.parse(text)


def test_a_student_layer_has_one_teacher_layer():
    with pytest.raises(UserError, match="--layer-map must name each layer of the student once, got '0:0,0:1'"):
        LayerMap.parse("0:0,0:1")


def test_a_model_without_a_published_map_needs_one():
    with pytest.raises(UserError, match="--layer-map must be given for SiT-S/2, .* but for .*SiT-B, SiT-L, SiT-XL"):
        choose_layer_map("", "SiT-S/2")


def test_a_layer_that_the_student_lacks_is_refused():
    LayerMap((0, 5), (0, 1)).check_student(6)
    with pytest.raises(UserError, match="--layer-map must name student layers from 0 to 5, got 6"):
        LayerMap((5, 6), (0, 1)).check_student(6)


def test_the_published_encoder_depths():
    sizes = ("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2", "another")
    assert [choose_encoder_depth(size, 24, attention=True) for size in sizes] == [5, 5, 8, 8, 8]
    assert [choose_encoder_depth(size, 24, attention=False) for size in sizes] == [8] * 5  # REPA's own
    assert choose_encoder_depth("SiT-XL/2", 3, attention=True) == 3
