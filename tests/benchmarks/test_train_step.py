"""The benchmark of a training step: its baseline computes the same, its states are what they are called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from haste.errors import UserError

ROOT = Path(__file__).parents[2] / "benchmarks" / "train_step"
sys.path.insert(0, str(ROOT))  # its files import each other as those of a script do

import parts  # noqa: E402
import report  # noqa: E402
import rounds  # noqa: E402
import run  # noqa: E402
from _common import keep, read_results  # noqa: E402
from cases import make_case  # noqa: E402
from variants import (  # noqa: E402
    ATTENTION,
    EAGER,
    EAGER_STOPPED,
    HASTE,
    REPA,
    STOPPED,
    VANILLA,
    make_contenders,
)

CASE = make_case("tiny", 64, None, "no", "cpu")


@pytest.fixture(params=["tiny", "tiny MM-DiT"])
def contenders(request):
    """With weights at which every layer is heard; the gates of a new model are shut."""
    torch.manual_seed(0)
    made = make_contenders(make_case(request.param, 64, None, "no", "cpu"))
    with torch.no_grad():
        for parameter in made[HASTE.name].model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return made


def loss_and_gradients(contender):
    torch.manual_seed(1)  # the same noise, times and dropped labels
    loss = contender.loss()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in contender.model.named_parameters()}
    contender.optimizer.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def test_the_eager_baseline_has_hastes_loss_and_gradients(contenders):
    loss, gradients = loss_and_gradients(contenders[HASTE.name])
    eager_loss, eager_gradients = loss_and_gradients(contenders[EAGER.name])
    torch.testing.assert_close(eager_loss, loss, rtol=1e-5, atol=1e-5)
    assert eager_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(eager_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_parts_of_the_losses_are_those_of_eager_code(contenders, monkeypatch):
    """What each part returns, by the gradients that it makes."""
    made, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: made.append(grad(*given)) or made[-1])
    calls = parts.make_parts(contenders[HASTE.name])
    for name in ("L_A: attention maps", "eager L_A, its maps in memory", "L_R: cosine", "eager L_R: cosine"):
        calls[name]()
    attention, eager_attention, feature, eager_feature = made
    torch.testing.assert_close(attention, eager_attention, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(feature, eager_feature, rtol=1e-3, atol=1e-6)
    assert len(attention) == 4 and max(gradient.abs().max() for gradient in attention) > 1e-4


def test_hastes_loss_is_vanillas_and_both_alignments(contenders):
    losses = {v: loss_and_gradients(contenders[v.name])[0] for v in (VANILLA, ATTENTION, REPA, HASTE)}
    torch.testing.assert_close(losses[HASTE] - losses[VANILLA], losses[ATTENTION] + losses[REPA] - 2 * losses[VANILLA])
    assert losses[ATTENTION] > losses[VANILLA] + 0.1


def test_after_tau_the_step_is_vanilla(contenders):
    vanilla, stopped = contenders[VANILLA.name], contenders[STOPPED.name]
    loss, gradients = loss_and_gradients(vanilla)
    stopped_loss, stopped_gradients = loss_and_gradients(stopped)
    torch.testing.assert_close(stopped_loss, loss, rtol=0, atol=0)
    torch.testing.assert_close(stopped_gradients, gradients, rtol=0, atol=0)
    assert stopped.held_bytes() == vanilla.held_bytes() < contenders[REPA.name].held_bytes()
    assert len(stopped.optimizer.state) == len(vanilla.optimizer.state)


def listening(function, maps):
    def listened(*inputs):
        *others, logits = function(*inputs)
        maps.append(logits.shape)
        return *others, logits

    return listened


def test_eager_after_tau_still_forms_its_maps_and_learns_nothing_from_them(contenders, monkeypatch):
    contender = contenders[EAGER_STOPPED.name]
    assert torch.equal(loss_and_gradients(contender)[0], loss_and_gradients(contenders[VANILLA.name])[0])
    maps = []
    for block in contender.model.blocks:
        listened, name = (block.attn, "forward") if hasattr(block, "attn") else (block, "attend_jointly")
        monkeypatch.setattr(listened, name, listening(getattr(listened, name), maps))
    contender.step()
    assert maps == [(CASE.batch, 4, 16, 16)] * 3


def test_a_step_moves_the_weights_that_all_contenders_share(contenders):
    first, second = contenders[HASTE.name], contenders[VANILLA.name]
    weight = next(second.model.blocks.parameters())
    before = weight.clone()
    first.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_script_measures_every_variant_and_plots_from_its_json_alone(tmp_path, capsys, monkeypatch, precision):
    monkeypatch.setattr(rounds, "PART_SECONDS", 0.01)
    flags = {"model": ["tiny"], "resolution": [64], "precision": [precision], "rounds": 2, "output": tmp_path}
    run.main(run.Args(**flags))
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["name"] for row in result["rows"]] == [
        "vanilla", "vanilla, again", "HASTE", "L_A alone", "REPA", "HASTE after τ", "HASTE, teacher included", "eager",
        "eager after τ",
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 2 and row["peak_bytes"] > row["held_bytes"] for row in result["rows"])
    assert all(len(part["seconds"]) == 2 and min(part["seconds"]) > 0 for part in result["parts"])

    text = (tmp_path / "results.md").read_text()
    for name in ("results.md", "results.png"):
        (tmp_path / name).unlink()
    run.main(run.Args(output=tmp_path, plot_only=True))
    assert (tmp_path / "results.md").read_text() == text
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert text in capsys.readouterr().out


def test_rows_can_be_chosen_and_the_text_is_in_the_title(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "PART_SECONDS", 0.01)
    run.main(run.Args(model=["tiny MM-DiT"], resolution=[64], variants=["eager"], rounds=1, output=tmp_path))
    (result,) = read_results(tmp_path)["results"]
    assert [row["name"] for row in result["rows"]] == ["vanilla", "HASTE", "eager"]
    assert report.title(result) == "tiny MM-DiT, 5 + 16 tokens, batch 2, float32, cpu"
    assert "The attention loss takes" in (tmp_path / "results.md").read_text()


def fake_result(**seconds):
    rows = [
        {"name": name, "seconds": times, "held_bytes": 2**20, "peak_bytes": 2**21} for name, times in seconds.items()
    ]
    parts = [{"name": name, "seconds": [0.01, 0.01]} for name in ("L_A: attention maps", "L_R: cosine")]
    machine = {"gpu": None, "threads": 2, "processor": "P", "cpu_capability": "avx2", "torch": "2", "haste_ext": "0",
               "commit": None, "date": "today"}  # fmt: skip
    case = {"model": "SiT-B/2", "tokens": 256, "batch": 2, "precision": "no", "device": "cpu"}
    return {"case": case, "machine": machine, "settings": {"rounds": 2, "steps_per_turn": 1}, "parameters": 1,
            "rows": rows, "parts": parts}  # fmt: skip


def test_ratios_are_taken_within_a_round_and_noise_is_vanilla_against_vanilla():
    seconds = {
        "vanilla": [1.0, 2.0],
        "vanilla, again": [1.01, 1.98],
        "HASTE": [1.1, 2.2],
        "HASTE after τ": [1.005, 2.01],
    }
    text = report.section(fake_result(**seconds))
    assert "| HASTE | 1,650.0 | 1,320.0 – 1,980.0 | 1.100 | 1.100 – 1.100 | 1 | 2 | 1.000 |" in text
    assert "| L_R: cosine | 10.00 | 0.75% | 0.60% – 0.90% | – |" in text
    assert "The attention loss takes 0.75% of a step: under 2%" in text and "takes 1.50%: under 2%" in text
    assert "By subtraction HASTE costs 10.0%" in text
    assert "takes 1.005 × vanilla" in text and "are up to 1.0% apart" in text and "the times are equal" in text

    text = report.section(fake_result(**{**seconds, "HASTE after τ": [1.05, 2.1]}))
    assert "the times are not equal" in text


def test_what_did_not_fit_is_said_in_the_table():
    result = fake_result(**{name: [1.0, 1.0] for name in ("vanilla", "vanilla, again", "HASTE", "HASTE after τ")})
    result["rows"].append({"name": "eager", "absent": "it wants more memory than there is"})
    assert "| eager | it wants more memory than there is |" in report.section(result)


def test_a_case_measured_again_takes_its_former_place(tmp_path):
    results = [fake_result(vanilla=[float(i)]) for i in (1, 2, 3)]
    results[1]["case"] = {**results[1]["case"], "model": "SiT-XL/2"}
    for result in results:
        keep(tmp_path, result)
    kept = read_results(tmp_path)["results"]
    assert [(r["case"]["model"], r["rows"][0]["seconds"]) for r in kept] == [("SiT-B/2", [3.0]), ("SiT-XL/2", [2.0])]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": ["SiT-Q/2"]}, "--model must be one of SiT-B/2, SiT-L/2, SiT-XL/2, MM-DiT-COCO, tiny, tiny MM-DiT"),
        ({"variants": ["lazy"]}, "--variants must be of vanilla, vanilla, again, HASTE, L_A alone, .*, got 'lazy'"),
        ({"precision": ["fp8"]}, "--precision must be one of no, bf16, got 'fp8'"),
        ({"resolution": [250]}, "--resolution must be a multiple of 16, such as 256, got 250"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"device": "tpu"}, "--device must be cpu or cuda, got 'tpu'"),
        ({"plot_only": True}, "results.json must be a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run.main(run.Args(output=tmp_path, **flags))


def test_memory_that_is_short_is_told_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "free_bytes", lambda device: 2**30)
    with pytest.raises(UserError, match=r"SiT-XL/2 needs 10\.\d GiB .* and 1\.0 GiB are free; choose"):
        run.main(run.Args(model=["SiT-XL/2"], output=tmp_path))


def test_a_batch_that_does_not_fit_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(
        UserError, match="tiny at --resolution 64 and --batch-size 1000000000 cannot be measured: it wants"
    ):
        run.main(run.Args(model=["tiny"], resolution=[64], batch_size=10**9, output=tmp_path))
