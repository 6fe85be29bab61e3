"""Muon beside AdamW: which parameters it trains, what a step computes, and runs that resume bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from haste.errors import UserError
from haste.generation.loaded import load_checkpoint
from haste.models import get_family
from haste.training.checkpoint import checkpoint_path, read_checkpoint, read_newest_checkpoint
from haste.training.config import TrainConfig
from haste.training.optimizer import MuonAndAdamW, build_optimizer, muon_matrices, parameter_groups
from haste.training.run_dir import RunDir
from haste.training.trainer import Trainer, load_dataset, make_accelerator, train
from small_models import WITH_PROJECTORS, random_sit
from torch import nn
from training_runs import assert_same_bits, final_state, read_log

MUON = {"optimizer": "muon", "mixed_precision": "no"}


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Keller Jordan's quintic, five times, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (6, 6)])
def test_a_step_follows_its_formula(shape):
    """Nesterov's momentum of 0.95, orthogonalized, times 0.2·√(larger side), and decoupled weight decay."""
    config = TrainConfig(optimizer="muon", learning_rate=0.1, adam_weight_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    matrix, other = nn.Parameter(torch.randn(shape, generator=generator)), nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([[other], [matrix]], config)
    expected, momentum = matrix.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        matrix.grad, other.grad = torch.randn(shape, generator=generator), torch.ones(3)
        optimizer.step()
        gradient = matrix.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonalized(0.05 * gradient + 0.95 * momentum)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * math.sqrt(max(shape)) * update
    # torch iterates in bfloat16, whose steps are of 2^-8: a relative error of some per cent of the update
    assert (matrix.double() - expected).abs().max() < 0.03 * 0.1 * 3 * math.sqrt(max(shape))
    adamw = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        adamw.param_groups[0]["params"][0].grad = torch.ones(3)
        adamw.step()
    torch.testing.assert_close(other, adamw.param_groups[0]["params"][0])


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else():
    model = random_sit(**WITH_PROJECTORS)
    matrices = muon_matrices(model, get_family(model).blocks(model))
    of_block = {name.removeprefix("blocks.0.") for name in matrices if name.startswith("blocks.0.")}
    assert of_block == {f"{name}.weight" for name in
                        ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")}  # fmt: skip
    assert all(name.startswith("blocks.") for name in matrices)
    parameters = dict(model.named_parameters())
    for decay, count in (("all", 2), ("matrices", 3)):
        groups = parameter_groups(parameters, decay, matrices)
        assert len(groups) == count and set(groups[-1]) == matrices
        assert sorted(name for group in groups for name in group) == sorted(parameters)
        optimizer = build_optimizer([[parameters[name] for name in group] for group in groups], TrainConfig(**MUON))
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(group) for group in groups]


def muon_and_adamw():
    """A matrix and a vector of ones, with their optimizer."""
    matrix, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([[other], [matrix]], TrainConfig(**MUON, learning_rate=0.1))
    assert isinstance(optimizer, MuonAndAdamW)
    return matrix, other, optimizer


def test_a_step_that_is_not_finite_changes_neither_weights_nor_state():
    matrix, other, optimizer = muon_and_adamw()
    kept = []
    for gradient, inf in ((1.0, 0.0), (math.nan, 1.0)):
        matrix.grad, other.grad = torch.full((2, 3), gradient), torch.full((3,), gradient)
        optimizer.found_inf = torch.tensor(inf)
        optimizer.step()
        kept.append([matrix.detach().clone(), other.detach().clone()])
    assert_same_bits(kept[0], kept[1])
    assert matrix.isfinite().all() and (matrix < 1).all() and (other < 1).all()
    assert optimizer.state[other]["step"] == 1 and optimizer.state[matrix]["momentum_buffer"].isfinite().all()


def test_a_scaler_skips_both_where_the_gradient_of_one_overflows():
    matrix, other, optimizer = muon_and_adamw()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, scale, weight in ((math.inf, 2.0, 1.0), (2.0, 2.0, 0.9)):
        scaler.scale(torch.ones(()))  # the scale exists from its first use on
        matrix.grad, other.grad = torch.full((2, 3), 2.0), torch.full((3,), gradient)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale and other.mean().item() == pytest.approx(weight)
        assert (matrix == 1).all() if gradient == math.inf else (matrix < 1).all()


@pytest.mark.parametrize("stop", [3, 9])  # before and after the projectors are freed
def test_a_run_resumes_bit_for_bit(make_config, stop):
    settings = {**MUON, "adam_decay": "matrices", "adam_weight_decay": 0.1, "gradient_accumulation_steps": 2,
                "extra_ema_decays": "0.5,0.75", "enc_type": make_config().enc_type}  # fmt: skip
    unbroken = train(make_config(exp_name="unbroken", **settings))
    train(make_config(max_train_steps=stop, **settings))
    assert_same_bits(final_state(train(make_config(**settings))), final_state(unbroken))
    state = final_state(unbroken)["opt"]
    assert [group.get("adjust_lr_fn") for group in state["param_groups"]] == [None, None, "match_rms_adamw"]


def test_the_loss_falls(make_config):
    log = read_log(train(make_config(**MUON, batch_size=64, max_train_steps=40, learning_rate=3e-3)).folder)
    losses = [line["loss"] for line in log]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and all(map(math.isfinite, losses))


def test_another_optimizer_is_refused_on_resuming_and_with_fsdp(make_config, monkeypatch):
    run = train(make_config(**MUON, max_train_steps=2))
    with pytest.raises(UserError, match="--optimizer muon, not adamw"):
        train(make_config(mixed_precision="no"))
    checkpoint = read_newest_checkpoint(run.folder / "checkpoints")
    number = next(n for n, entry in checkpoint["opt"]["state"].items() if "momentum_buffer" in entry)
    checkpoint["opt"]["state"][number] = {"exp_avg": torch.zeros(1)}
    torch.save(checkpoint, checkpoint_path(run.folder / "checkpoints", 2))
    with pytest.raises(UserError, match="opt of .* must hold a momentum of its shape for blocks.0"):
        read_newest_checkpoint(run.folder / "checkpoints")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="^--optimizer must be adamw with FSDP, got muon, which needs whole matrices$"):
        make_accelerator(make_config(**MUON))


def test_a_new_run_may_begin_from_weights_of_another_optimizer(make_config):
    first = train(make_config(exp_name="first", mixed_precision="no", max_train_steps=2))
    second = train(make_config(**MUON, max_train_steps=1, init_from=str(first.folder)))
    assert len(read_log(second.folder)) == 1


# ---- several averages ----


def test_each_average_follows_its_decay_and_is_chosen_by_it(make_config):
    config = make_config(mixed_precision="no", extra_ema_decays="0.5, 0.0", max_train_steps=3, checkpointing_steps=1)
    folder = train(config).folder
    saved = [read_checkpoint(checkpoint_path(folder / "checkpoints", step)) for step in (1, 2, 3)]
    assert {"ema_0.5", "ema_0.0"} < saved[0].keys()
    name = "blocks.0.attn.qkv.weight"
    for before, after in zip(saved[:-1], saved[1:], strict=True):
        for part, decay in (("ema", config.ema_decay), ("ema_0.5", 0.5), ("ema_0.0", 0.0)):
            expected = torch.lerp(before[part][name], after["model"][name], 1 - decay)
            torch.testing.assert_close(after[part][name], expected)
    for chosen, part in ((True, "ema"), (False, "model"), (0.5, "ema_0.5"), (config.ema_decay, "ema")):
        assert torch.equal(load_checkpoint(folder, chosen).model.state_dict()[name], saved[-1][part][name])
    known = f"{config.ema_decay!r}, 0.5, 0.0"
    with pytest.raises(UserError, match=f"^--ema-decay must be one that the checkpoint has, {known}, got 0.25$"):
        load_checkpoint(folder, 0.25)
    with pytest.raises(UserError, match="--extra-ema-decays 0.5, 0.0, not 0.5"):
        train(replace(config, extra_ema_decays="0.5", max_train_steps=4))
    path = checkpoint_path(folder / "checkpoints", 3)
    torch.save({**torch.load(path, weights_only=False), "ema_0.5": {}}, path)
    with pytest.raises(UserError, match=r"^ema_0.5 of .*0000003.pt must be a dictionary of weights, got {}$"):
        load_checkpoint(path, 0.5)


def test_averages_of_a_new_run_begin_from_those_of_the_same_decay(make_config):
    shared = {"mixed_precision": "no", "learning_rate": 1e-2}
    first = train(make_config(exp_name="first", extra_ema_decays="0.5", max_train_steps=3, **shared))
    began = read_checkpoint(checkpoint_path(first.folder / "checkpoints", 3))
    config = make_config(extra_ema_decays="0.5,0.75", init_from=str(first.folder), **shared)
    state = Trainer(config, load_dataset("digits", 8), RunDir(config), make_accelerator(config)).state
    for part, source in (("ema", "ema"), ("ema_0.5", "ema_0.5"), ("ema_0.75", "ema")):
        found = state.models[part].state_dict()["x_embedder.proj.weight"]
        assert torch.equal(found, began[source]["x_embedder.proj.weight"]), part


@pytest.mark.parametrize("text", ["0.9999", "0.5,0.5", "1.0", "-0.1", "fast", "0.5,", "nan"])
def test_decays_that_cannot_be_are_refused(make_config, text):
    with pytest.raises(UserError, match="--extra-ema-decays must be numbers from 0 to below 1"):
        make_config(extra_ema_decays=text, ema_decay=0.9999).check()
