"""The benchmark of SiT and DiT on the digits: its runs, its tables, and from a run to the table."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_scripts import script_folder
from digits_run import write_run
from haste import digits
from haste.digits import ClassifierConfig

FOLDER = Path(__file__).parents[2] / "benchmarks" / "digits"


@pytest.fixture
def run():
    with script_folder(FOLDER):
        yield importlib.import_module("run")


@pytest.mark.parametrize(("model", "preset"), [("sit", "digits"), ("dit", "dit-digits")])
def test_runs_differ_in_their_coefficients_alone(run, model, preset):
    args = run.Args(model=model, output_dir=Path("out"))
    vanilla, repa, haste, endless = (run.run_config(args, method, 1) for method in run.METHODS)
    assert not vanilla.teachers and repa.aligns_features and not repa.aligns_attention and haste.aligns_attention
    assert endless.early_stop_point == repa.early_stop_point == -1
    assert 0 < haste.early_stop_point < haste.max_train_steps == 5 * haste.checkpointing_steps
    assert {config.preset for config in (vanilla, repa, haste, endless)} == {preset}
    same = {"attn_coeff": 0.0, "proj_coeff": 0.0, "exp_name": vanilla.exp_name}
    assert replace(haste, **same) == vanilla


def test_dit_sees_as_many_images_as_sit_by_the_same_alignment(run):
    sit, dit = (run.run_config(run.Args(model=model), "HASTE", 0) for model in ("sit", "dit"))
    own = ("preset", "exp_name", "model", "learning_rate")
    assert replace(dit, **{name: getattr(sit, name) for name in own}) == sit and dit.model == "DiT-Digits/2"


def test_the_tables_are_those_of_the_json(run):
    for benchmark in run.MODELS.values():
        text = (FOLDER / f"{benchmark.stored}.md").read_text()
        assert run.write_up(benchmark, run.stored_results(benchmark)) == text
    assert "| DiT, HASTE |" in text and "| SiT, HASTE |" in text


def test_a_run_is_scored_once_and_written_up(run, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "SAMPLES", 70)
    few = {name: kind._replace(settings=replace(kind.settings, num_steps=2)) for name, kind in run.MODELS.items()}
    few["dit"] = few["dit"]._replace(settings=few["sit"].settings)  # the trained model is a SiT
    monkeypatch.setattr(run, "MODELS", few)
    trained = []

    def train_to_end(config):
        trained.append(config.preset)
        return write_run(tmp_path / config.exp_name)

    monkeypatch.setattr(run, "train_to_end", train_to_end)
    for model in ("sit", "dit", "dit"):
        run.main(run.Args(model=model, methods=["vanilla"], seeds=[0], output_dir=tmp_path))
    assert trained == ["digits", "dit-digits"]
    (own,) = json.loads((tmp_path / "dit.json").read_text())["runs"]
    text = (tmp_path / "dit.md").read_text()
    assert f"| DiT, vanilla | {own['points'][0]['fd']:,.2f} |" in text and "| SiT, vanilla |" in text
    for name in ("dit.png", "results.png", "advantage.png"):
        assert (tmp_path / name).is_file()
