"""DiT is trained by its own loss with all that the trainer has: aligned, resumed bit for bit, by several processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from forked_haste import finish, start_ranks
from haste import digits
from haste.alignment.aligner import Aligner
from haste.cli.main import main
from haste.diffusion import noise_loss
from haste.digits import ClassifierConfig
from haste.errors import UserError
from haste.evaluation.checkpoints import read_records
from haste.models import build_model, get_family
from haste.models.dit import DiT, DiTFamily
from haste.training import trainer as training
from haste.training.config import TrainConfig
from haste.training.run_dir import RunDir
from haste.training.trainer import train
from torch import Tensor, nn
from training_processes import LAUNCHER, assert_same_run, last, outputs
from training_runs import assert_a_killed_run_is_the_unbroken_one, final_state, read_log


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch) -> None:
    size = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2}
    monkeypatch.setitem(get_family("dit").sizes, "DiT-Tiny/2", size)


@pytest.fixture
def make_dit(make_config) -> Callable[..., TrainConfig]:
    """A HASTE run of 12 steps on the digits, whose alignment ends at step 6."""
    return partial(make_config, model="DiT-Tiny/2", sampling_steps=0)


def test_it_learns_and_its_alignment_ends(make_dit):
    settings = {"max_train_steps": 60, "early_stop_point": 40, "logging_steps": 20, "checkpointing_steps": 60}
    first, second, third = read_log(train(make_dit(batch_size=16, learning_rate=8e-3, **settings)).folder)
    assert third["loss"] < 0.7 * first["loss"]
    assert second["proj_loss"] < first["proj_loss"] and second["attn_loss"] < first["attn_loss"]
    assert not third["aligned"] and third["proj_loss"] is None and third["attn_loss"] is None


# ---- the losses ----


@pytest.fixture
def seen(monkeypatch) -> SimpleNamespace:
    """What the losses of the last step were computed of."""
    last = SimpleNamespace(aligned=None)
    align, loss = Aligner.forward, DiTFamily.loss

    def aligner(self, output, images, outputs=None):
        last.aligned = output, self.teacher_outputs(images)
        return align(self, output, images)

    def family(self, predicted, target):
        last.prediction, last.target = predicted.detach(), target
        return loss(self, predicted, target)

    monkeypatch.setattr(Aligner, "forward", aligner)
    monkeypatch.setattr(DiTFamily, "loss", family)
    return last


def attention_by_definition(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], prefix: int) -> Tensor:
    """The mean cross-entropy of a student's attention maps and a teacher's, whose class token is left out."""
    logits = []
    for (q, k), first in ((student, 0), (teacher, prefix)):
        q, k = (x.detach().double()[:, :, first:] for x in (q, k))
        logits.append(q @ k.mT / q.shape[-1] ** 0.5)
    ours, theirs = logits
    return -(theirs.softmax(-1) * (ours - ours.logsumexp(-1, keepdim=True))).sum(-1).mean()


@pytest.mark.parametrize(
    ("method", "coefficients"), [("haste", (0.5, 0.5)), ("repa", (0.5, 0.0)), ("vanilla", (0.0, 0.0))]
)
def test_the_losses_of_a_step_are_those_of_the_definitions(make_dit, seen, method, coefficients):
    of_features, of_attention = coefficients
    config = make_dit(max_train_steps=4, proj_coeff=of_features, attn_coeff=of_attention, learning_rate=0.02)
    line = read_log(train(config).folder)[-1]
    x, noise, t = seen.target
    assert not t.is_floating_point() and seen.prediction.shape == (4, 2, 8, 8) and seen.prediction.abs().min() > 0
    own = noise_loss(seen.prediction.double(), seen.target._replace(x=x.double(), noise=noise.double())).item()
    assert line["loss"] == pytest.approx(own, rel=1e-5)
    total = own
    assert (seen.aligned is None) == (method == "vanilla")
    if seen.aligned is not None:
        output, (teacher,) = seen.aligned
        cosine = nn.functional.cosine_similarity(output.projections[0].detach().double(),
                                                 teacher.patch_tokens.double(), dim=-1)  # fmt: skip
        assert line["proj_loss"] == pytest.approx(-cosine.mean().item(), rel=1e-5)
        total += of_features * line["proj_loss"]
    if method == "haste":
        pairs = zip(output.queries_keys, teacher.queries_keys, strict=True)
        maps = [attention_by_definition(*pair, teacher.prefix) for pair in pairs]
        assert len(maps) == 2 and line["attn_loss"] == pytest.approx(torch.stack(maps).mean().item(), rel=1e-5)
        total += of_attention * line["attn_loss"]
    else:
        assert line["attn_loss"] is None
    assert line["total_loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("rule", ["gradient-cosine", "cosine-ramp", "plateau"])
def test_the_other_rules_end_its_alignment_by_probes_at_its_times(make_dit, rule, monkeypatch):
    times, embed = set(), DiT.embed
    monkeypatch.setattr(DiT, "embed", lambda self, x, t, y: times.update(t.tolist()) or embed(self, x, t, y))
    monkeypatch.setattr(DiTFamily, "sample_times", lambda *args, **kwargs: torch.full((4,), 7))  # those of training
    settings = {"probe_start": 2, "probe_every": 1, "probe_images": 8, "probe_threshold": 1.0, "max_train_steps": 4}
    result = train(make_dit(termination=rule, early_stop_point=3, **settings))
    end = 2 if rule == "gradient-cosine" else 3
    assert [line["aligned"] for line in read_log(result.folder)] == [step < end for step in range(4)]
    assert times == {7} | (set() if rule == "cosine-ramp" else {20, 100, 500, 799})


# ---- resuming, precision, compilation ----


@pytest.mark.parametrize("stop", [5, 10])  # aligned, and after that; a step or two after a checkpoint
def test_a_killed_run_resumes_bit_for_bit(make_dit, monkeypatch, stop):
    assert_a_killed_run_is_the_unbroken_one(partial(make_dit, random_flip=True), monkeypatch, stop)


def test_random_flips_are_recorded_and_change_the_run(make_dit):
    flipped = train(make_dit(random_flip=True, max_train_steps=2))
    as_they_are = train(make_dit(exp_name="other", max_train_steps=2))
    assert read_log(flipped.folder)[1]["loss"] != read_log(as_they_are.folder)[1]["loss"]
    with pytest.raises(UserError, match="--random-flip True, not False"):
        train(make_dit(max_train_steps=4))


def test_accumulation_is_a_larger_batch(make_dit):
    whole = train(make_dit(exp_name="whole", batch_size=8, max_train_steps=2))
    parts = train(make_dit(exp_name="parts", batch_size=4, gradient_accumulation_steps=2, max_train_steps=2))
    for a, b in zip(read_log(whole.folder), read_log(parts.folder), strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=1e-4)


def test_half_precision_is_near(make_dit):
    logs = []
    for kind in ("no", "bf16"):
        logs.append(read_log(train(make_dit(exp_name=kind, mixed_precision=kind)).folder))
        AcceleratorState._reset_state(reset_partial_state=True)
    full, half = ([line["loss"] for line in log] for log in logs)
    assert half == pytest.approx(full, rel=0.05) and half != full


def test_its_blocks_are_compiled_whole(make_dit, monkeypatch):
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: original(self, backend="eager", **kw))
    logs = [read_log(train(make_dit(exp_name=str(on), compile=on, max_train_steps=2)).folder) for on in (False, True)]
    for a, b in zip(*logs, strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=1e-4)


# ---- what a run leaves ----


def test_a_run_is_recorded_sampled_evaluated_and_reported(make_dit, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))
    result = train(make_dit(sampling_steps=6, max_train_steps=6, early_stop_point=3))
    assert [path.name for path in (result.folder / "samples").iterdir()] == ["0000006.png"]
    saved = final_state(result)
    assert saved["model_config"]["family"] == "dit"
    model = build_model(saved["model_config"], z_dims=(16,))
    model.load_state_dict(saved["model"], strict=True)
    words = ["--num-fid-samples", "70", "--num-steps", "2", "--labels", "balanced"]
    main(["evaluate", "--run", str(result.folder), "--classifier-dir", str(tmp_path / "classifier"), *words])
    assert [record["mode"] for record in read_records(result.folder / "evaluation.jsonl")] == ["ddim", "ddim"]
    main(["report", str(result.folder)])
    assert "Diffusion loss" in (result.folder / "report.html").read_text()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"prediction": "v"}, "--prediction must be noise for --model DiT-Tiny/2, got v"),
        ({"model": "SiT-Tiny/2", "prediction": "noise"}, "--prediction must be v for --model SiT-Tiny/2, got noise"),
        ({"path_type": "cosine"}, "--path-type must be linear for DiT, got cosine"),
        ({"weighting": "lognormal"}, "--weighting must be uniform for DiT, got lognormal"),
        ({"time_shift": 2.0}, "--time-shift must be 1.0 for DiT, got 2.0"),
        ({"layer_map": "3:0"}, "--layer-map must name student layers from 0 to 2, got 3"),
        ({"entity": "cell"}, "--entity must be left out for DiT"),
    ],
)
def test_what_cannot_work_is_refused_before_any_data_is_read(make_dit, change, flag, monkeypatch):
    monkeypatch.setattr(training, "load_dataset", None)
    with pytest.raises(UserError, match=flag):
        train(make_dit(**change))
    assert not RunDir(make_dit()).path.exists()


@pytest.mark.parametrize(("of", "to"), [("SiT", "DiT"), ("DiT", "SiT")])
def test_weights_of_the_other_are_refused_before_there_is_a_teacher(make_dit, of, to, monkeypatch):
    first = train(make_dit(exp_name="first", model=f"{of}-Tiny/2", max_train_steps=1))
    monkeypatch.setattr(training, "build_aligner", None)
    with pytest.raises(UserError, match=f"--init-from must be a checkpoint of {to}, .* got one of {of}"):
        train(make_dit(model=f"{to}-Tiny/2", init_from=str(first.folder)))
    with pytest.raises(UserError, match=f"--model {of}-Tiny/2, not {to}-Tiny/2"):
        train(make_dit(exp_name="first", model=f"{to}-Tiny/2", max_train_steps=2))


# ---- several processes ----

STEPS = 10
WORDS = [
    "train", "--preset", "dit-digits", "--exp-name", "run", "--depth", "3", "--hidden-size", "32", "--layer-map",
    "0:1,1:2", "--encoder-depth", "2", "--projector-dim", "8", "--early-stop-point", "6", "--logging-steps", "1",
    "--checkpointing-steps", "4", "--sampling-steps", "10", "--random-flip", "--max-train-steps", str(STEPS),
]  # fmt: skip
HALVES = ["--batch-size", "4", "--gradient-accumulation-steps", "2"]  # the local batches that two processes have


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, teacher_folder) -> Path:
    folder = tmp_path_factory.mktemp("one")
    main([*WORDS, *HALVES, "--output-dir", str(folder), "--enc-type", str(teacher_folder)])
    return folder


def test_a_copy_each_equals_one_process(tmp_path, teacher_folder, one_process):
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
    saved = last(tmp_path)
    build_model(saved["model_config"], z_dims=(16,)).load_state_dict(saved["model"], strict=True)
