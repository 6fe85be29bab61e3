"""A model family that haste has never heard of: trained, resumed, sampled and cached, with no change of haste."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import haste
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from haste.models import Family, Layout, ModelOutput, build_model, register, registry
from haste.samplers import sample
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

BITS = 4


class BitsModel(nn.Module):
    """A perceptron over patches of 2 x 2, each with a time of its own, given the bits of the label as ±1.

    t is (B, tokens), or (B,) for one time everywhere. The condition is (B, BITS); zeros stand for none.
    """

    def __init__(self, side: int, width: int, depth: int, z_dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.grid = side // 2
        self.positions = nn.Parameter(torch.randn(self.grid**2, width) * 0.02)
        self.first = nn.Linear(4 + 1 + BITS, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.projectors = nn.ModuleList(nn.Linear(width, z) for z in z_dims)
        self.last = nn.Linear(width, 4)

    def times(self, t: Tensor) -> Tensor:
        """(B, tokens)."""
        return t if t.dim() == 2 else t[:, None].expand(-1, self.grid**2)

    def forward(
        self, x: Tensor, t: Tensor, bits: Tensor, aligned_layers: Sequence[int] = (), project: bool = False
    ) -> ModelOutput:
        patches = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        rows = [patches, self.times(t)[..., None], bits[:, None].expand(-1, self.grid**2, -1)]
        tokens = self.first(torch.cat([row.to(patches.dtype) for row in rows], dim=2)) + self.positions
        for block in self.blocks:
            tokens = tokens + block(tokens).relu()
        images = self.last(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        projections = [projector(tokens) for projector in self.projectors] if project else []
        return ModelOutput(nn.functional.pixel_shuffle(images, 2), [], projections)


class BitsFamily(Family):
    name = "bits"
    title = "BitsModel"
    sizes = {"Bits-S": {"width": 32, "depth": 2}}

    def build(self, config: dict[str, Any], z_dims: Sequence[int] = ()) -> BitsModel:
        return BitsModel(**config, z_dims=z_dims)

    def config_for(self, size: Mapping[str, Any], settings: Any, data: Any) -> dict[str, Any]:
        assert data.channels == 1 and data.num_classes <= 2**BITS
        return {**size, "side": data.input_size}

    def layout(self, config: Mapping[str, Any]) -> Layout:
        side = config["side"]
        return Layout((1, side, side), side // 2, config["depth"], 1, 2**BITS)

    def condition(self, labels: Tensor) -> Tensor:
        return 2.0 * (labels[:, None] >> torch.arange(BITS, device=labels.device) & 1) - 1

    def null(self, model: nn.Module) -> Tensor:
        return torch.zeros(BITS)

    def sample_times(self, model, batch, weighting, path, *, device=None, generator=None) -> Tensor:
        times = super().sample_times(model, batch * model.grid**2, weighting, path, device=device, generator=generator)
        return times.view(batch, -1)

    def interpolate(self, model, x, noise, t, path) -> tuple[Tensor, Tensor]:
        times = model.times(t).unflatten(1, (1, model.grid, model.grid))
        per_pixel = times.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return super().interpolate(model, x, noise, per_pixel, path)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
        register(BitsFamily())
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    folder = tmp_path_factory.mktemp("teacher")
    Dinov2Model(Dinov2Config(**sizes, num_channels=1)).save_pretrained(folder)
    return folder


def train(folder: Path, teacher: Path, steps: int) -> Path:
    """Six steps at most, of which the first four are aligned with a teacher's features; returns the run's folder."""
    config = haste.TrainConfig(
        output_dir=str(folder), exp_name="run", data_dir="digits", resolution=8, model="Bits-S", batch_size=8,
        enc_type=str(teacher), proj_coeff=0.5, attn_coeff=0.0, encoder_depth=2, early_stop_point=4,
        max_train_steps=steps, checkpointing_steps=3, sampling_steps=6, logging_steps=1, mixed_precision="no",
        learning_rate=1e-3,
    )  # fmt: skip
    try:
        return haste.train(config).folder
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    return train(tmp_path_factory.mktemp("exps"), teacher, steps=6)


def weights(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{step:07d}.pt", weights_only=False)


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(run, tmp_path, teacher):
    train(tmp_path, teacher, steps=3)
    resumed = weights(train(tmp_path, teacher, steps=6), 6)
    unbroken = weights(run, 6)
    assert unbroken["model_config"] == {"family": "bits", "width": 32, "depth": 2, "side": 8}
    for part in ("model", "ema"):
        assert list(resumed[part]) == list(unbroken[part])
        assert all(torch.equal(value, resumed[part][name]) for name, value in unbroken[part].items())
    assert not torch.equal(unbroken["model"]["first.weight"], weights(run, 3)["model"]["first.weight"])


def test_its_projectors_stay_in_its_checkpoints_when_alignment_has_ended(run):
    before, after = (weights(run, step)["model"] for step in (3, 6))
    assert list(before) == list(after) and after["projectors.0.weight"].shape == (16, 32)


def test_training_wrote_samples_of_it(run):
    assert len(list(run.rglob("0000006.png"))) == 1


def test_a_checkpoint_makes_the_model_again(run):
    loaded = haste.load_checkpoint(run)
    assert isinstance(loaded.model, BitsModel) and not loaded.model.projectors
    assert isinstance(build_model(loaded.model_config), BitsModel)
    assert torch.equal(loaded.model.last.weight, weights(run, 6)["ema"]["last.weight"])


def test_it_is_sampled_with_its_own_condition(run):
    images = haste.sample(run, labels=[1, 1, 8], num_steps=3, cfg_scale=2.0)
    assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8
    assert (images == haste.sample(haste.load_checkpoint(run), labels=[1, 1, 8], num_steps=3, cfg_scale=2.0)).all()
    assert (images[2] != haste.sample(run, labels=[1, 1, 3], num_steps=3, cfg_scale=2.0)[2]).any()


def test_its_output_is_cached(run):
    model = haste.load_checkpoint(run).model
    noise, bits = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, BITS)
    settings = {"num_steps": 20, "cfg_scale": 2.0, "null": torch.zeros(BITS)}
    uncached = sample(model, noise, bits, **settings)
    fast = haste.enable_cache(model, cache="taylor", granularity="output", interval=4, order=1)
    cached = sample(fast, noise, bits, **settings)
    assert fast.report.forecast_calls > fast.report.full_calls > 0
    assert 0 < (cached - uncached).norm() < 0.1 * uncached.norm()
    assert haste.disable_cache(fast) is model
    assert torch.equal(sample(model, noise, bits, **settings), uncached)


def test_the_sampler_caches_its_output_and_nothing_else(run):
    settings = {"labels": [1, 8], "num_steps": 20, "cache": "taylor", "interval": 4, "order": 1}
    cached = haste.sample(run, granularity="output", **settings)
    assert cached.shape == (2, 8, 8, 3) and (cached != haste.sample(run, labels=[1, 8], num_steps=20)).any()
    with pytest.raises((ValueError, haste.UserError), match="granularity"):
        haste.sample(run, granularity="model", **settings)


def test_a_cache_that_needs_blocks_is_refused(run):
    fast = haste.enable_cache(haste.load_checkpoint(run).model, cache="taylor", granularity="module")
    with pytest.raises(ValueError, match="granularity"):
        sample(fast, torch.zeros(2, 1, 8, 8), torch.ones(2, BITS), num_steps=20)


def test_two_families_cannot_share_the_name_of_a_size():
    class Other(BitsFamily):
        name = "other"

    with pytest.raises(ValueError, match="bits and other both have the size Bits-S"):
        register(Other())


def test_fast_forecasts_its_output(run):
    fast = haste.sample(run, labels=[1, 8], num_steps=12, fast=True)
    spelled = {"cache": "newton", "granularity": "output", "interval": 3, "spacing": "even", "order": 2}
    assert (fast == haste.sample(run, labels=[1, 8], num_steps=12, **spelled)).all()
    assert (fast != haste.sample(run, labels=[1, 8], num_steps=12)).any()


def test_fast_is_recorded_as_it_is(run, tmp_path):
    haste.sample(run, labels=[1, 8], num_steps=12, fast=True, folder=tmp_path)
    (record,) = tmp_path.rglob("sample.json")
    settings = json.loads(record.read_text())["settings"]
    assert (settings["cache"], settings["granularity"]) == ("newton", "output")
