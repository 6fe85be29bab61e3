from __future__ import annotations

import pytest
import torch
from haste.alignment import Aligner, LayerMap
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


def student(z_dims):
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10}
    torch.manual_seed(0)
    return SiT(**sizes, hidden_size=16, depth=3, num_heads=2, encoder_depth=2, z_dims=z_dims, projector_dim=8)


def run(aligner):
    images, t, labels = torch.rand(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])
    model = student(aligner.z_dims)
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
