from __future__ import annotations

import pytest
import torch
from haste.alignment import Aligner, LayerMap
from haste.errors import UserError
from haste.models import SiT
from transformers import Dinov2Config, Dinov2Model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two teachers of different width."""
    paths = []
    for width in (16, 24):
        torch.manual_seed(width)
        config = Dinov2Config(
            hidden_size=width, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=2, num_channels=1
        )
        paths.append(tmp_path_factory.mktemp(f"width{width}"))
        Dinov2Model(config).save_pretrained(paths[-1])
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


def test_repa_asks_for_no_queries_and_keys(folders):
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
    assert [lesson.patch_tokens.shape[1] for lesson in aligner.ask(images)] == [16, 16]
    total.backward()
    assert model.blocks[0].attn.qkv.weight.grad[:32].abs().sum() > 0
    with pytest.raises(UserError, match="6 x 6 tokens and the student has 4 x 4"):
        Aligner.from_pretrained(folders, LayerMap((0,), (1,)), **settings)
