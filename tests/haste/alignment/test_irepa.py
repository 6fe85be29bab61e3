"""iREPA (arXiv 2512.10794): projector and normalisation against their definitions in float64, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from haste.alignment import Aligner, LayerMap
from haste.alignment.aligner import spatially_normalised
from haste.errors import UserError
from haste.models import build_model
from haste.models.layers import ConvProjector, build_projector
from small_models import save_teacher

COMMON = {"num_classes": 10, "z_dims": (5, 7), "projector_dim": 8, "projection_layer_type": "conv"}
SIZE = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 3, "num_heads": 2,
        "encoder_depth": 2}  # fmt: skip
XAR = {"width": 16, "heads": 2, "encoder_depth": 2, "decoder_depth": 1, "channels": 1, "grid": 4, "patch_size": 2,
       "align_depth": 2}  # fmt: skip
ROWS = list(range(16))
CELLS = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # of 2 x 2 tokens on a grid of 4 x 4
FAMILIES = {
    "sit": ({**SIZE, **COMMON}, ROWS),
    "dit": ({**SIZE, **COMMON}, ROWS),
    "mmdit": ({**SIZE, "context_tokens": 3, "context_width": 6, **{k: COMMON[k] for k in COMMON if k != "num_classes"}},
              ROWS),
    "xar": ({**XAR, **COMMON, "entity": "cell"}, CELLS),
    "xar-scale": ({**XAR, **COMMON, "entity": "scale"}, ROWS),
}  # fmt: skip


def convolved(tokens, weight, bias):
    """A 3 x 3 convolution with zeros around it, token by token: (B, 16, width) row by row to (B, 16, out)."""
    maps, out = tokens.reshape(len(tokens), 4, 4, -1), np.tile(bias, (len(tokens), 4, 4, 1))
    for row, column, down, right in np.ndindex(4, 4, 3, 3):
        r, c = row + down - 1, column + right - 1
        if 0 <= r < 4 and 0 <= c < 4:
            out[:, row, column] += maps[:, r, c] @ weight[:, :, down, right].T
    return out.reshape(len(tokens), 16, -1)


def test_the_projector_is_one_convolution_over_rows_and_columns():
    projector = ConvProjector(6, 5).double()
    tokens = torch.rand(2, 16, 6, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in (projector.projection_layer.weight, projector.projection_layer.bias))
    expected = convolved(tokens.numpy(), weight, bias)
    np.testing.assert_allclose(projector(tokens).detach().numpy(), expected, rtol=1e-12)
    assert sorted(projector.state_dict()) == ["projection_layer.bias", "projection_layer.weight"]  # the public names


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_convolves_its_tokens_row_by_row_and_returns_them_in_its_order(name):
    config, order = FAMILIES[name]
    family = name.split("-")[0]
    torch.manual_seed(0)
    model = build_model({"family": family, **{k: v for k, v in config.items() if k != "z_dims"}}, config["z_dims"])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.double().eval()
    after = []
    blocks = model.blocks
    blocks[1].register_forward_hook(lambda _, __, out: after.append(out[family == "mmdit"]))
    x, t = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    condition = torch.rand(2, 3, 6, dtype=torch.float64) if family == "mmdit" else torch.tensor([1, 2])
    if family == "dit":
        t = torch.tensor([100, 900])
    output = model(x, t, condition, project=True)
    hidden = after[0][:, -16:].detach().numpy()
    rows = np.empty_like(hidden)
    rows[:, order] = hidden
    assert [p.shape[2] for p in output.projections] == [5, 7]
    for projection, projector in zip(output.projections, model.projectors, strict=True):
        weight, bias = (p.detach().numpy() for p in projector.projection_layer.parameters())
        expected = convolved(rows, weight, bias)[:, order]
        np.testing.assert_allclose(projection.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["sit", "xar", "mmdit"])
def test_the_trunk_does_not_depend_on_the_kind_of_projector(family):
    config = {k: v for k, v in FAMILIES[family][0].items() if k not in ("z_dims", "projection_layer_type")}
    states = []
    for kind in ("mlp", "conv"):
        torch.manual_seed(0)
        states.append(build_model({"family": family, **config, "projection_layer_type": kind}, (5,)).state_dict())
    trunks = [{k: v for k, v in state.items() if not k.startswith("projectors.")} for state in states]
    assert trunks[0].keys() == trunks[1].keys() and all(torch.equal(trunks[0][k], trunks[1][k]) for k in trunks[0])


def test_a_projector_of_another_kind_is_refused():
    with pytest.raises(UserError, match="projection_layer_type must be one of mlp, conv, sra, got 'linear'"):
        build_projector(4, 4, 4, "linear")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_normalisation_is_that_of_the_definition(dtype):
    features = (3 * torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    exact = features.double().numpy()
    mean, std = exact.mean(1, keepdims=True), exact.std(1, keepdims=True, ddof=1)
    found = spatially_normalised(features, 0.6)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(found.double(), (exact - 0.6 * mean) / (std + 1e-6), rtol=1e-5, atol=1e-5)


def test_one_token_has_no_deviation():
    with pytest.raises(UserError, match="--spnorm-method must be none for one token"):
        spatially_normalised(torch.zeros(2, 1, 4), 0.6)


def test_the_aligner_normalises_the_features_and_leaves_the_attention(tmp_path):
    folder, images = str(save_teacher(tmp_path)), torch.rand(2, 1, 8, 8)
    plain, spatial = (
        Aligner.from_pretrained(folder, LayerMap((0,), (1,)), grid=4, zscore_alpha=alpha) for alpha in (None, 0.6)
    )
    before, after = plain.teacher_outputs(images)[0], spatial.teacher_outputs(images)[0]
    assert torch.equal(before.queries_keys[0][0], after.queries_keys[0][0])
    exact = before.patch_tokens.double()
    expected = (exact - 0.6 * exact.mean(1, keepdim=True)) / (exact.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(after.patch_tokens.double(), expected, rtol=1e-4, atol=1e-5)
    projected = torch.rand(2, 16, 16)
    cosine = -torch.cosine_similarity(projected.double(), expected, dim=2).mean()
    loss = spatial.losses([torch.rand(2, 2, 2, 16, 8).unbind(0)], [projected], [after]).feature
    torch.testing.assert_close(loss.double(), cosine, rtol=0, atol=1e-5)
