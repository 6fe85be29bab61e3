"""MM-DiT is trained on captions as SiT is on classes: aligned, resumed bit for bit, by several processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_images import TOKENS, WIDTH, write_captioned
from forked_haste import finish, start_ranks
from haste.cli.main import main
from haste.errors import UserError
from haste.generation import load_checkpoint
from haste.models import build_model, get_family
from haste.training.checkpoint import checkpoint_path
from haste.training.config import TrainConfig, resolve
from haste.training.run_dir import RunDir
from haste.training.trainer import Trainer, load_dataset, make_accelerator, train
from small_models import save_teacher
from torch import nn
from training_processes import LAUNCHER, assert_same_run, outputs
from training_runs import assert_a_killed_run_is_the_unbroken_one, assert_same_bits, read_log


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch) -> None:
    size = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    monkeypatch.setitem(get_family("mmdit").sizes, "MM-DiT-Tiny", size)


@pytest.fixture(scope="session")
def color_teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("color"), num_channels=3)


@pytest.fixture(scope="session")
def captions(tmp_path_factory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("coco256_features"))


@pytest.fixture
def make_mmdit(make_config, captions, color_teacher) -> Callable[..., TrainConfig]:
    """A HASTE run of 12 steps on latents with captions, whose alignment ends at step 6."""
    own = {"data_dir": str(captions), "resolution": 64, "model": "MM-DiT-Tiny", "enc_type": str(color_teacher)}
    return partial(make_config, **own, sampling_steps=0, num_workers=0)


def make_trainer(config: TrainConfig) -> Trainer:
    data = load_dataset(config.data_dir, config.resolution)
    config = resolve(config, num_classes=data.num_classes)
    return Trainer(config, data, RunDir(config), make_accelerator(config))


def test_it_learns_and_its_alignment_ends(make_mmdit):
    settings = {"max_train_steps": 45, "early_stop_point": 30, "logging_steps": 15, "checkpointing_steps": 45}
    folder = train(make_mmdit(batch_size=16, learning_rate=8e-3, **settings)).folder
    first, second, third = read_log(folder)
    assert third["loss"] < 0.8 * first["loss"]
    assert second["proj_loss"] < first["proj_loss"] and second["attn_loss"] < first["attn_loss"]
    assert not third["aligned"] and third["proj_loss"] is None and third["attn_loss"] is None


@pytest.mark.parametrize("stop", [5, 10])  # aligned, and after that; a step or two after a checkpoint
def test_a_killed_run_resumes_bit_for_bit(make_mmdit, monkeypatch, stop):
    assert_a_killed_run_is_the_unbroken_one(make_mmdit, monkeypatch, stop)


def test_a_caption_is_chosen_anew_in_each_epoch_and_by_the_seed(make_mmdit, monkeypatch):
    seen: list[torch.Tensor] = []
    original = Trainer._forward_backward
    monkeypatch.setattr(
        Trainer, "_forward_backward",
        lambda self, batch, *rest: seen.append(batch.condition) or original(self, batch, *rest),
    )  # fmt: skip
    runs = []
    for seed in (0, 0, 1):
        train(make_mmdit(exp_name=f"run{len(runs)}", seed=seed, max_train_steps=12, enc_type=None))
        runs.append(torch.cat(seen))
        seen.clear()
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len(torch.unique(runs[0], dim=0)) > 12  # more features than there are images


def test_dropped_captions_are_the_empty_one(make_mmdit, captions, monkeypatch):
    empty = torch.from_numpy(np.load(captions.parent / "empty_context.npy"))
    seen: list[torch.Tensor] = []
    trainer = make_trainer(make_mmdit(cfg_prob=0.5, max_train_steps=8, enc_type=None))
    model = trainer.state.forward
    original = model.forward
    monkeypatch.setattr(
        model, "forward", lambda x, t, context, *rest: seen.append(context) or original(x, t, context, *rest)
    )
    trainer.run()
    rows = torch.cat(seen)
    dropped = (rows == empty).flatten(1).all(dim=1)
    assert 8 <= dropped.sum() <= 24 and len(rows) == 32


def test_checkpoints_record_the_text_and_load_in_the_public_code_s_model(make_mmdit):
    folder = train(make_mmdit(checkpointing_steps=6)).folder / "checkpoints"
    for step in (6, 12):  # with projectors, and with freed ones
        written = torch.load(checkpoint_path(folder, step), weights_only=False)
        assert written["text"]["tokens"] == TOKENS and written["text"]["width"] == WIDTH
        assert written["null"].shape == (TOKENS, WIDTH)
        model = build_model(written["model_config"], z_dims=(16,))
        assert list(model.state_dict()) == list(written["model"])
        model.load_state_dict(written["model"], strict=True)
        shapes = [value.shape for value in model.parameters()]
        state = written["opt"]["state"]
        assert all(state[number]["exp_avg"].shape == shapes[number] for number in state)
        assert len(state) == len(shapes) - (6 if step == 12 else 0)  # the projector has six
    loaded = load_checkpoint(folder.parent)
    assert torch.equal(loaded.family.null(loaded.model), written["null"]) and loaded.recorded["text"] == written["text"]


def test_without_dropping_there_is_no_empty_caption(make_mmdit):
    result = train(make_mmdit(cfg_prob=0.0, max_train_steps=2))
    assert torch.load(checkpoint_path(result.folder / "checkpoints", 2), weights_only=False)["null"] is None


@pytest.mark.parametrize("method", ["repa", "baseline", "attention alone"])
def test_the_other_methods_are_coefficients(make_mmdit, method):
    coefficients = {"repa": (0.0, 0.5), "baseline": (0.0, 0.0), "attention alone": (0.5, 0.0)}[method]
    log = read_log(train(make_mmdit(attn_coeff=coefficients[0], proj_coeff=coefficients[1], max_train_steps=2)).folder)
    for line in log:
        assert [line[name] is not None for name in ("attn_loss", "proj_loss")] == [c > 0 for c in coefficients]


@pytest.mark.parametrize("rule", ["gradient-cosine", "cosine-ramp", "plateau"])
def test_the_other_rules_end_its_alignment(make_mmdit, rule):
    settings = {"probe_start": 2, "probe_every": 1, "probe_images": 8, "probe_threshold": 1.0, "max_train_steps": 4}
    result = train(make_mmdit(termination=rule, early_stop_point=3, **settings))
    end = 2 if rule == "gradient-cosine" else 3
    assert [line["aligned"] for line in read_log(result.folder)] == [step < end for step in range(4)]


def test_accumulation_and_half_precision(make_mmdit):
    config = make_mmdit(batch_size=2, gradient_accumulation_steps=2, mixed_precision="bf16", max_train_steps=3)
    assert all(line["loss"] < 20 and line["attn_loss"] > 0 for line in read_log(train(config).folder))


def test_its_blocks_are_compiled_whole(make_mmdit, monkeypatch):
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: original(self, backend="eager", **kw))
    small = {"max_train_steps": 2}
    logs = [read_log(train(make_mmdit(exp_name=str(on), compile=on, **small)).folder) for on in (False, True)]
    for a, b in zip(*logs, strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=1e-4)


def test_a_new_run_starts_from_a_file_of_the_public_trainer(make_mmdit, tmp_path):
    config, path = make_trainer(make_mmdit()).model_config, tmp_path / "0150000.pt"
    weights, average = (build_model(config, z_dims=(16,)).state_dict() for _ in range(2))
    args = {"model": "mmdit", "encoder_depth": 2, "enc_type": "dinov2-vit-b", "path_type": "linear"}
    torch.save({"model": weights, "ema": average, "opt": {}, "args": args, "steps": 150_000}, path)
    # 32 channels a head is what such a file cannot tell.
    begun = make_trainer(make_mmdit(init_from=str(path), num_heads=1)).state
    own = {name: value for name, value in weights.items() if not name.startswith("projectors.")}
    found = {name: value for name, value in begun.model.state_dict().items() if name in own}
    assert_same_bits(found, own)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"model": "SiT-Tiny/2"}, "--model must be conditioned on text"),
        ({"data_dir": "digits", "resolution": 8}, "--data-dir must hold captions"),
        ({"qk_norm": True}, "--qk-norm must be left out for MM-DiT"),
        ({"resolution": 128}, "128 x 128 pixels, as --resolution, got 64 x 64"),
        ({"layer_map": "3:0"}, "--layer-map must name student layers from 0 to 2, got 3"),
        ({"entity": "cell"}, "--entity must be left out for MM-DiT"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(make_mmdit, change, flag):
    with pytest.raises(UserError, match=flag):
        train(make_mmdit(**change))
    assert not RunDir(make_mmdit()).path.exists()


def test_features_of_another_width_are_refused(make_mmdit, tmp_path):
    first = train(make_mmdit(max_train_steps=1))
    other = str(write_captioned(tmp_path / "wide", width=WIDTH + 2))
    with pytest.raises(UserError, match=f"--data-dir must have text features of width {WIDTH}"):
        make_trainer(make_mmdit(exp_name="other", data_dir=other, init_from=str(first.folder)))
    with pytest.raises(UserError, match=f"--data-dir must be the data .* text features of width {WIDTH + 2}"):
        train(make_mmdit(data_dir=other, max_train_steps=2))


def test_images_are_needed_by_a_teacher_alone(make_mmdit, tmp_path):
    data = str(write_captioned(tmp_path / "bare", images=False))
    train(make_mmdit(exp_name="vanilla", data_dir=data, enc_type=None, max_train_steps=1))
    with pytest.raises(UserError, match="--data-dir"):
        train(make_mmdit(data_dir=data))


def test_a_damaged_file_is_passed_over_in_samples_too(make_mmdit, tmp_path):
    data = write_captioned(tmp_path / "damaged")
    (data / "0_0.npy").write_bytes(b"nothing")
    found = load_dataset(str(data), 64, on_bad_file="skip")
    condition, titles = found.examples(1)
    assert torch.equal(condition[0], found.example(1)[1]) and len(titles) == 1
    train(make_mmdit(data_dir=str(data), on_bad_file="skip", enc_type=None, max_train_steps=2))


# ---- several processes ----

STEPS = 10
WORDS = [
    "train", "--exp-name", "run", "--model", "MM-DiT-Digits", "--depth", "3", "--hidden-size", "32", "--resolution",
    "64", "--layer-map", "0:1,1:2", "--encoder-depth", "2", "--projector-dim", "8", "--attn-coeff", "0.5",
    "--early-stop-point", "6", "--logging-steps", "1", "--checkpointing-steps", "4", "--sampling-steps", "0",
    "--num-workers", "0", "--learning-rate", "4e-3", "--ema-decay", "0.99", "--mixed-precision", "no",
    "--max-train-steps", str(STEPS),
]  # fmt: skip
HALVES = ["--batch-size", "4", "--gradient-accumulation-steps", "2"]  # the local batches that two processes have


@pytest.fixture(scope="module")
def words(tmp_path_factory, color_teacher) -> list[str]:
    """On latents without variance: their random numbers are each process's own."""
    data = write_captioned(tmp_path_factory.mktemp("certain"), logvar=-30)
    return [*WORDS, "--data-dir", str(data), "--enc-type", str(color_teacher)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("one")
    main([*words, *HALVES, "--output-dir", str(folder)])
    return folder


def test_a_copy_each_equals_one_process(tmp_path, words, one_process):
    ranks = start_ranks([*words, "--batch-size", "8", "--output-dir", str(tmp_path)], outputs(tmp_path))
    for rank, output in zip(ranks, outputs(tmp_path), strict=True):
        finish(rank, output)
    assert_same_run(tmp_path, one_process)


def test_a_share_each_equals_one_process(tmp_path, words, one_process):
    command = [*LAUNCHER, *words, "--batch-size", "8", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, one_process)
    saved = torch.load(checkpoint_path(tmp_path / "run" / "checkpoints", STEPS), weights_only=False)
    build_model(saved["model_config"], z_dims=(16,)).load_state_dict(saved["model"], strict=True)
