"""--gradient-checkpointing: the same bits from less memory, for every family, with dropout, by several processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest
import torch
from forked_haste import finish, start_ranks
from haste.cli.main import main
from haste.models import XAR, DiT, MMDiT, SiT, get_family
from haste.training.state import recompute_in_backward
from haste.training.trainer import Trainer, train
from torch import Tensor, nn
from training_processes import LAUNCHER, assert_same_run, outputs
from training_runs import assert_same_bits, final_state, read_log

PARTS = {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}
SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 4, "num_heads": 2}
HEADS = {"z_dims": (5,), "projector_dim": 8}
NEW: dict[str, Callable[[], nn.Module]] = {
    "sit": lambda: SiT(**SIZES, **HEADS, encoder_depth=2),
    "sit with lightningdit's parts": lambda: SiT(**SIZES, **HEADS, **PARTS, encoder_depth=2),
    "dit": lambda: DiT(**SIZES, **HEADS, encoder_depth=2),
    "mmdit": lambda: MMDiT(**SIZES, **HEADS, encoder_depth=2, context_tokens=3, context_width=12),
    "xar with dropout": lambda: XAR(
        width=32, heads=2, encoder_depth=2, decoder_depth=2, channels=3, grid=4, dropout=0.3, align_depth=2, **HEADS
    ),
}


def gradients(name: str, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Of all parameters, from the prediction and all that alignment reads; and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    model = NEW[name]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15)
    family = get_family(model)
    model.train(name.startswith("xar"))
    if recompute:
        recompute_in_backward(family.blocks(model), dropout=name.startswith("xar"))
    x, condition = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 12) if name == "mmdit" else torch.arange(4)
    if name.startswith("xar"):
        x = x[..., :4, :4]
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(x, family.sample_times(model, 4, "uniform", "linear"), condition, (0, 3), True)
    loss = output.prediction.square().mean() + output.projections[0].square().mean()
    loss = loss + sum((q * k).mean() for q, k in output.queries_keys)
    torch.manual_seed(7)  # what comes between forward and backward changes nothing
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("name", NEW)
def test_gradients_are_the_same_bits_from_less_memory(name):
    (kept_all, much), (computed_again, little) = (gradients(name, recompute) for recompute in (False, True))
    assert len(kept_all) > 40
    assert_same_bits(computed_again, kept_all)
    assert little < 0.5 * much


def test_it_may_change_when_a_run_is_resumed(make_config, monkeypatch):
    """A run with all of LightningDiT's parts, that is killed and goes on with it: the unbroken one without, bit for
    bit, over the end of alignment, probes included."""
    rule = {"termination": "plateau", "probe_start": 2, "probe_every": 3, "probe_images": 8, "sampling_steps": 12}
    settings = {**PARTS, **rule, "hidden_size": 24}
    unbroken = train(make_config(exp_name="unbroken", **settings))
    with monkeypatch.context() as patch:
        original = Trainer._train_step
        patch.setattr(Trainer, "_train_step", lambda self: original(self) if self.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_config(**settings))
    torch.manual_seed(999)
    result = train(make_config(**settings, gradient_checkpointing=True))
    saved = final_state(result)
    assert_same_bits(saved, final_state(unbroken))
    assert [line["loss"] for line in read_log(result.folder)] == [line["loss"] for line in read_log(unbroken.folder)]
    assert {name: saved["model_config"][name] for name in PARTS} == PARTS
    assert sum("feat_rope" in name for name in saved["ema"]) == 2


def test_compiled_blocks_are_computed_again(make_config, monkeypatch):
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: original(self, backend="eager", **kw))
    logs = [
        read_log(train(make_config(exp_name=str(on), compile=on, gradient_checkpointing=on, max_train_steps=2)).folder)
        for on in (False, True)
    ]
    for a, b in zip(*logs, strict=True):
        assert a["total_loss"] == pytest.approx(b["total_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# ---- several processes ----

WORDS = [
    "train", "--preset", "digits", "--exp-name", "run", "--depth", "3", "--hidden-size", "32", "--layer-map", "0:1,1:2",
    "--encoder-depth", "2", "--projector-dim", "8", "--early-stop-point", "6", "--logging-steps", "1",
    "--checkpointing-steps", "4", "--sampling-steps", "0", "--max-train-steps", "8", "--positions", "rope", "--norm",
    "rmsnorm", "--mlp", "swiglu", "--qk-norm",
]  # fmt: skip
TOGETHER = ["--batch-size", "8", "--gradient-checkpointing"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("one")
    halves = ["--batch-size", "4", "--gradient-accumulation-steps", "2"]  # the local batches that two processes have
    main([*WORDS, *halves, "--output-dir", str(folder), "--enc-type", str(teacher_folder)])
    return folder


def test_a_copy_each_equals_one_process_without_it(tmp_path, teacher_folder, one_process):
    words = [*WORDS, *TOGETHER, "--output-dir", str(tmp_path), "--enc-type", str(teacher_folder)]
    ranks = start_ranks(words, outputs(tmp_path))
    for rank, output in zip(ranks, outputs(tmp_path), strict=True):
        finish(rank, output)
    assert_same_run(tmp_path, one_process)


def test_a_share_each_equals_one_process_without_it(tmp_path, teacher_folder, one_process):
    words = [*WORDS, *TOGETHER, "--output-dir", str(tmp_path), "--enc-type", str(teacher_folder)]
    done = subprocess.run([*LAUNCHER, *words], capture_output=True, text=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, one_process)
