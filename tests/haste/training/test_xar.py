"""xAR is trained as SiT is: aligned, resumed bit for bit, by several processes; and with what it alone has."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from forked_haste import finish, start_ranks
from haste.cli.main import main
from haste.errors import UserError
from haste.models import XAR, SiT, build_model
from haste.training.checkpoint import checkpoint_path, read_checkpoint
from haste.training.config import TrainConfig, resolve
from haste.training.run_dir import RunDir
from haste.training.samples import TrainingSamples
from haste.training.state import TrainState
from haste.training.trainer import Trainer, load_dataset, make_accelerator, train
from torch import nn
from training_processes import LAUNCHER, assert_same_run, outputs
from training_runs import assert_a_killed_run_is_the_unbroken_one, assert_same_bits, final_state, read_log

PUBLISHED = {
    "dropout": 0.1, "weighting": "lognormal", "adam_beta2": 0.96, "adam_weight_decay": 0.02, "adam_decay": "matrices",
    "warmup_steps": 0.125, "decay_steps": 0.25,
}  # fmt: skip


@pytest.fixture
def make_xar(make_config) -> Callable[..., TrainConfig]:
    """A HASTE run of 12 steps on 4 cells of 2 x 2 tokens whose alignment ends at step 6."""
    return partial(make_config, model="xAR-Tiny/2", sampling_steps=0, **PUBLISHED)


def vanilla(make: Callable[..., TrainConfig], **changes) -> TrainConfig:
    return make(attn_coeff=0.0, proj_coeff=0.0, max_train_steps=2, **changes)


def make_trainer(config: TrainConfig) -> Trainer:
    config = resolve(config, num_classes=10)
    return Trainer(config, load_dataset("digits", 8), RunDir(config), make_accelerator(config))


def test_it_learns_and_its_alignment_ends(make_xar):
    settings = {"max_train_steps": 45, "early_stop_point": 30, "logging_steps": 15, "checkpointing_steps": 45}
    folder = train(make_xar(batch_size=16, learning_rate=8e-3, sampling_steps=45, **settings)).folder
    first, second, third = read_log(folder)
    assert third["loss"] < 0.5 * first["loss"]
    assert second["proj_loss"] < first["proj_loss"] - 0.1 and second["attn_loss"] < first["attn_loss"]
    assert not third["aligned"] and third["proj_loss"] is None and third["attn_loss"] is None
    assert [path.name for path in (folder / "samples").iterdir()] == ["0000045.png"]


@pytest.mark.parametrize("stop", [5, 10])  # aligned, and after that, in the decay; a step or two after a checkpoint
def test_a_killed_run_resumes_bit_for_bit(make_xar, monkeypatch, stop):
    assert_a_killed_run_is_the_unbroken_one(make_xar, monkeypatch, stop)


def test_checkpoints_load_strictly_in_the_public_code_s_model_and_its_optimizer(make_xar):
    folder = train(make_xar(checkpointing_steps=6)).folder / "checkpoints"
    for step in (6, 12):  # with projectors, and with freed ones
        written = torch.load(checkpoint_path(folder, step), weights_only=False)
        assert written["model"]["mask"].shape == (1, 1, 16, 16)
        assert written["model"]["encoder_blocks.0.attn.rope.freqs_cos"].shape == (16, 8)
        model = build_model(written["model_config"], z_dims=(16,))
        model.load_state_dict(written["model"], strict=True)
        shapes = [value.shape for _, value in model.named_parameters()]
        state = written["opt"]["state"]
        assert all(state[number]["exp_avg"].shape == shapes[number] for number in state)
        assert len(state) == len(shapes) - (6 if step == 12 else 0)  # the projector has six
        small = [number for number, (name, value) in enumerate(model.named_parameters()) if value.dim() == 1]
        assert [group["params"] for group in written["opt"]["param_groups"]] == [
            small,
            [number for number in range(len(shapes)) if number not in small],
        ]


# ---- dropout ----


def test_dropout_changes_no_other_random_number_and_acts_in_training_alone(make_xar, monkeypatch):
    modes, original = [], XAR.forward
    monkeypatch.setattr(XAR, "forward", lambda self, *args: modes.append(self.training) or original(self, *args))
    rule = {"termination": "plateau", "probe_start": 0, "probe_every": 100, "probe_images": 8, "max_train_steps": 3}
    with_dropout, without = (train(make_xar(exp_name=f"d{p}", dropout=p, **rule)) for p in (0.5, 0.0))
    probe = [False] * 4 * 4  # forwards: batches of 2 images at four times
    assert modes == [*probe, *[True] * 3, *probe, *[False] * 3]
    one, other = (final_state(result) for result in (with_dropout, without))
    assert one["termination"] == other["termination"]
    assert_same_bits(one["rng"], other["rng"])
    first, second = (read_log(result.folder)[0]["loss"] for result in (with_dropout, without))
    assert first != second


def test_dropout_is_a_function_of_seed_step_and_local_batch(make_xar):
    config = make_xar(dropout=0.5)
    state: TrainState = make_trainer(config).state
    x, t, y = torch.rand(2, 1, 8, 8), torch.rand(2, 4), torch.tensor([1, 2])

    def velocity(*number):
        before = torch.get_rng_state()
        output = state(x, t, y, (), False, number).prediction
        assert torch.equal(torch.get_rng_state(), before)
        return output

    assert torch.equal(velocity(3, 1), velocity(3, 1))
    others = [velocity(3, 0), velocity(2, 1), velocity(1, 3)]
    state.config = replace(config, seed=1)
    assert not any(torch.equal(velocity(3, 1), other) for other in others)


def test_sit_is_trained_in_eval_mode(make_config, monkeypatch):
    modes, original = set(), SiT.forward
    monkeypatch.setattr(SiT, "forward", lambda self, *args: modes.add(self.training) or original(self, *args))
    train(make_config(max_train_steps=2))
    assert modes == {False}


# ---- what xAR alone has ----


@pytest.mark.parametrize(
    "entity", [("token", None), ("cell", None), ("cell", 1), ("subsample", 2), ("scale", 1), ("image", None)]
)
def test_every_entity_is_trained_and_aligned(make_xar, entity):
    kind, size = entity
    sampling = 2 if kind == "scale" else 0  # whose noise is no image
    result = train(make_xar(entity=kind, entity_size=size, max_train_steps=2, batch_size=2, sampling_steps=sampling))
    assert (result.folder / "samples" / "0000002.png").exists() == bool(sampling)
    config = read_checkpoint(checkpoint_path(result.folder / "checkpoints", 2))["model_config"]
    assert config["entity"] == kind and (size is None or config["entity_size"] == size)
    assert all(line["loss"] < 20 and line["attn_loss"] > 0 for line in read_log(result.folder))


@pytest.mark.parametrize("context", ["random", "clean", "increasing", "decreasing"])
def test_every_context_is_trained_and_its_features_aligned(make_xar, context):
    log = read_log(train(make_xar(context=context, attn_coeff=0.0, max_train_steps=2, batch_size=2)).folder)
    assert all(line["loss"] < 20 and line["proj_loss"] is not None for line in log)


def test_one_image_at_a_time_without_labels_to_drop_and_in_bf16(make_xar):
    config = make_xar(batch_size=1, cfg_prob=0.0, mixed_precision="bf16", max_train_steps=3)
    assert all(line["loss"] < 20 and line["attn_loss"] > 0 for line in read_log(train(config).folder))


@pytest.mark.parametrize("rule", ["gradient-cosine", "cosine-ramp"])
def test_the_other_rules_end_its_alignment(make_xar, rule):
    settings = {"probe_start": 2, "probe_images": 8, "probe_threshold": 1.0, "max_train_steps": 4}
    result = train(make_xar(termination=rule, early_stop_point=3, **settings))
    end = 2 if rule == "gradient-cosine" else 3
    assert [line["aligned"] for line in read_log(result.folder)] == [step < end for step in range(4)]


@pytest.mark.parametrize("bare", [True, False])
def test_a_new_run_starts_from_released_weights_and_from_a_file_of_the_public_trainer(make_xar, tmp_path, bare):
    config, path = make_trainer(vanilla(make_xar)).model_config, tmp_path / "xAR-Tiny.pth"
    weights, average = (dict(build_model(config).state_dict()) for _ in range(2))
    args = argparse.Namespace(model="xar_tiny", epochs=800, lr=None, batch_size=64, class_num=1000)
    torch.save(weights if bare else {"model": weights, "model_ema": average, "epoch": 3, "args": args}, path)
    assert "mask" in weights and not torch.equal(weights["pred.weight"], average["pred.weight"])
    begun = make_trainer(vanilla(make_xar, init_from=str(path))).state
    assert_same_bits(dict(begun.model.state_dict()), weights)
    assert_same_bits(dict(begun.ema.model.state_dict()), weights if bare else average)


@pytest.mark.parametrize("change", [{"entity": "token"}, {"entity": "subsample"}, {"entity_size": 1}])
def test_weights_whose_tokens_are_in_another_order_are_refused(make_xar, tmp_path, change):
    path = tmp_path / "xAR-Tiny.pt"
    config = make_trainer(vanilla(make_xar)).model_config
    torch.save({"model": build_model(config).state_dict(), "model_config": config}, path)
    make_trainer(vanilla(make_xar, init_from=str(path), context="increasing"))
    with pytest.raises(UserError, match="--entity must be cell with --entity-size 2"):
        make_trainer(vanilla(make_xar, init_from=str(path), **change))


def test_its_blocks_are_compiled_whole(make_xar, monkeypatch):
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: original(self, backend="eager", **kw))
    small = {"depth": 2, "layer_map": "0:1", "encoder_depth": 1, "max_train_steps": 2}
    logs = [read_log(train(make_xar(exp_name=str(on), compile=on, **small)).folder) for on in (False, True)]
    for a, b in zip(*logs, strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"entity_size": 3}, "--entity-size must divide the 4 tokens"),
        ({"entity": "image", "entity_size": 2}, "--entity-size must be left out with --entity image"),
        ({"context": "clean"}, "--attn-coeff must be 0 with --context clean"),
        ({"qk_norm": True}, "--qk-norm must be left out for xAR"),
        ({"patch_size": 3}, "--patch-size"),
        ({"num_heads": 8}, "--hidden-size must be a multiple of 4 for each of 8 heads"),
        ({"layer_map": "3:0"}, "--layer-map must name student layers from 0 to 2, got 3"),
        ({"warmup_steps": 20}, "--warmup-steps and --decay-steps must fit into the 12 steps"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(make_xar, change, flag):
    with pytest.raises(UserError, match=flag):
        train(make_xar(**change))
    assert not RunDir(make_xar()).path.exists()


def test_weights_of_another_family_are_refused(make_config, make_xar):
    sit = train(make_config(exp_name="sit", max_train_steps=1))
    with pytest.raises(UserError, match="--init-from must be a checkpoint of xAR, .* got one of SiT"):
        make_trainer(make_xar(init_from=str(sit.folder)))
    shutil.copytree(sit.folder, RunDir(make_xar()).path)
    with pytest.raises(UserError, match="--model SiT-Tiny/2, not xAR-Tiny/2"):
        train(make_xar())


@pytest.mark.parametrize("entity", ["cell", "image"])
def test_shards_are_gathered_for_a_sampler_that_takes_the_model_apart(make_xar, monkeypatch, entity):
    gathered = []
    monkeypatch.setattr("haste.training.samples.unsharded", lambda model: nullcontext(gathered.append(model)))
    trainer = make_trainer(vanilla(make_xar, entity=entity))
    shape = trainer.layout.noise_shape
    samples = TrainingSamples(trainer.folder.path, trainer.config, trainer.data, trainer.accelerator, shape)
    samples.sample(trainer.state.ema.model, 0)
    assert gathered == [trainer.state.ema.model]


# ---- several processes ----

STEPS = 10
WORDS = [
    "train", "--preset", "xar-digits", "--exp-name", "run", "--depth", "3", "--hidden-size", "32", "--layer-map",
    "0:1,1:2", "--encoder-depth", "2", "--early-stop-point", "6", "--logging-steps", "1", "--checkpointing-steps", "4",
    "--sampling-steps", "10", "--dropout", "0.1", "--adam-decay", "matrices", "--adam-weight-decay", "0.02",
    "--decay-steps", "0.25", "--max-train-steps", str(STEPS),
]  # fmt: skip
HALVES = ["--batch-size", "4", "--gradient-accumulation-steps", "2"]  # the local batches that two processes have


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("one")
    main([*WORDS, *HALVES, "--output-dir", str(folder), "--enc-type", str(teacher_folder)])
    return folder


def test_a_copy_each_equals_one_process_also_in_what_is_dropped(tmp_path, teacher_folder, one_process):
    words = [*WORDS, "--batch-size", "8", "--output-dir", str(tmp_path), "--enc-type", str(teacher_folder)]
    ranks = start_ranks(words, outputs(tmp_path))
    for rank, output in zip(ranks, outputs(tmp_path), strict=True):
        finish(rank, output)
    assert_same_run(tmp_path, one_process)


def test_a_share_each_equals_one_process(tmp_path, teacher_folder, one_process):
    words = [*WORDS, "--batch-size", "8", "--output-dir", str(tmp_path), "--enc-type", str(teacher_folder)]
    done = subprocess.run([*LAUNCHER, *words], capture_output=True, text=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, one_process)
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["0000010.png"]
    saved = torch.load(checkpoint_path(tmp_path / "run" / "checkpoints", STEPS), weights_only=False)
    model = build_model(saved["model_config"], z_dims=(16,))
    model.load_state_dict(saved["model"], strict=True)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert {number: tuple(state["exp_avg"].shape) for number, state in saved["opt"]["state"].items()}.items() <= dict(
        enumerate(shapes)
    ).items()
