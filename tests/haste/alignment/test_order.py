"""Alignment of a model whose tokens have an order of their own and see only some, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from haste.alignment import Aligner, LayerMap
from haste.alignment.aligner import reordered
from haste.alignment.termination import NOISE_SEED, gradient_cosine, mean_alignment_loss
from haste.models import build_model, get_family
from haste.teachers import TeacherOutput
from small_models import save_teacher
from torch.nn import functional as F

from haste_ext import reference

FAMILY = get_family("xar")
CELLS = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # of 2 x 2 tokens, on a grid of 4 x 4
SUBSAMPLES = [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]  # at distances of 2
ROWS = list(range(16))
# kind, order, tokens of a block of the mask, places in front of the image's
LAYOUTS = [
    ("cell", CELLS, 4, 0),
    ("subsample", SUBSAMPLES, 4, 0),
    ("token", ROWS, 1, 0),
    ("image", ROWS, 0, 0),
    ("scale", ROWS, 0, 4),
]
T = (0.1, 0.6)


@pytest.fixture(scope="module")
def aligner(tmp_path_factory) -> Aligner:
    """Two teachers; the first one's attention."""
    folders = [save_teacher(tmp_path_factory.mktemp(f"width{n}"), seed=n, hidden_size=n) for n in (16, 24)]
    names = [str(folder) for folder in folders]
    return Aligner.from_pretrained(names, LayerMap((0, 2), (1, 2)), grid=4, proj_coeff=0.25, attn_coeff=2.0)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_model(entity: str):
    torch.manual_seed(0)
    model = build_model(
        {"family": "xar", "width": 16, "heads": 4, "encoder_depth": 2, "decoder_depth": 1, "channels": 1, "grid": 4,
         "patch_size": 2, "entity": entity, "num_classes": 10, "align_depth": 2, "projector_dim": 8},
        z_dims=(16, 24),
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def run(model, images, time=0.3):
    x = images.to(next(model.parameters()).dtype)
    noise = torch.randn(FAMILY.noise_shape(model, x), generator=torch.Generator().manual_seed(NOISE_SEED)).to(x)
    t = torch.full((len(x),), time, dtype=x.dtype)
    x_t, target = FAMILY.interpolate(model, x, noise, t, "linear")
    return model(x_t, t, torch.arange(len(x)), (0, 2), True), target


def definition(output, teachers, order, causal, prefix):
    """L_A and L_R in float64, with the teachers' tokens picked one by one."""
    first = teachers[0]
    picked = [[torch.stack([x[:, :, first.prefix + n] for n in order], dim=2).double() for x in pair]
              for pair in first.queries_keys]  # fmt: skip
    attention = [
        reference.attn_align_loss(*student, *teacher, student_prefix=prefix, causal=causal)
        for student, teacher in zip(output.queries_keys, picked, strict=True)
    ]
    features = [
        -F.cosine_similarity(
            projected, torch.stack([teacher.patch_tokens[:, n] for n in order], dim=1).double(), dim=2
        ).mean()
        for projected, teacher in zip(output.projections, teachers, strict=True)
    ]
    return sum(attention) / 2, sum(features) / 2


@pytest.mark.parametrize(("entity", "order", "causal", "prefix"), LAYOUTS)
def test_both_losses_and_their_gradients_are_those_of_the_definition(aligner, images, entity, order, causal, prefix):
    model = make_model(entity)
    output, _ = run(model, images)
    assert (output.causal, output.prefix) == (causal, prefix)
    total, losses = aligner(output, images)
    attention, feature = definition(output, aligner.teacher_outputs(images), order, causal, prefix)
    torch.testing.assert_close(losses.attention, attention, rtol=0, atol=1e-10)
    torch.testing.assert_close(losses.feature.double(), feature, rtol=0, atol=1e-6)
    parameters = list(model.blocks[0].parameters())
    gradients, expected = (
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in (total, 2.0 * attention + 0.25 * feature)
    )
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    assert max(one.abs().max() for one in gradients) > 1e-4


@pytest.mark.parametrize(("entity", "order", "causal", "prefix"), LAYOUTS[:2])
def test_neither_order_nor_mask_is_without_effect(aligner, images, entity, order, causal, prefix):
    output, _ = run(make_model(entity), images)
    losses = aligner.losses_of(output, aligner.teacher_outputs(images))
    row_by_row = aligner.losses_of(output._replace(order=None), aligner.teacher_outputs(images))
    unmasked = aligner.losses_of(output._replace(causal=0), aligner.teacher_outputs(images))
    assert abs(losses.attention - row_by_row.attention) > 1e-4 and abs(losses.feature - row_by_row.feature) > 1e-4
    assert abs(losses.attention - unmasked.attention) > 1e-4 and losses.feature == unmasked.feature


def test_the_prefix_of_a_teacher_is_left_out_and_its_other_tokens_are_gathered_once():
    q, k, features = torch.arange(6.0).view(1, 1, 6, 1), torch.arange(10.0, 16).view(1, 1, 6, 1), torch.rand(1, 4, 2)
    output = reordered(TeacherOutput([(q, k)], 2, features), torch.tensor([3, 1, 0, 2]))
    assert output.prefix == 0
    assert [x.flatten().tolist() for x in output.queries_keys[0]] == [[5, 3, 2, 4], [15, 13, 12, 14]]
    assert torch.equal(output.patch_tokens, features[:, [3, 1, 0, 2]])
    assert reordered(TeacherOutput([], 2, None), torch.tensor([0])).patch_tokens is None


@pytest.mark.parametrize(("entity", "order", "causal", "prefix"), LAYOUTS)
def test_the_probes_of_both_rules_see_the_same_order_and_mask(aligner, images, entity, order, causal, prefix):
    model = make_model(entity)
    parameters, outputs = list(model.blocks[1].parameters()), aligner.teacher_outputs(images)
    cosines, means = [], []
    for time in T:
        output, target = run(model, images, time=time)
        attention, feature = definition(output, outputs, order, causal, prefix)
        vectors = [
            torch.cat([g.flatten() for g in torch.autograd.grad(
                loss, parameters, retain_graph=True, materialize_grads=True)])
            for loss in (2.0 * attention + 0.25 * feature, (output.prediction - target).square().mean())
        ]  # fmt: skip
        cosines.append(torch.cosine_similarity(*vectors, dim=0).item())
        means.append((2.0 * attention + 0.25 * feature).item())
    model.float()
    batches = [(images, images, torch.arange(3))]
    assert gradient_cosine(model, aligner, batches, 1, T) == pytest.approx(sum(cosines) / 2, abs=1e-3)
    assert mean_alignment_loss(model, aligner, batches, T) == pytest.approx(sum(means) / 2, rel=1e-4)
