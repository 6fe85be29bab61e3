"""The benchmarks of xAR on the digits: how many steps a method gets, and a run from a model to the table."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_scripts import script_folder
from haste import digits
from haste.digits import ClassifierConfig
from xar_run import write_xar_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def training():
    with script_folder(BENCHMARKS / "digits"):
        yield importlib.import_module("xar")


@pytest.fixture
def sampling(tmp_path, monkeypatch):
    with script_folder(BENCHMARKS / "digits_sampling"):
        module = importlib.import_module("xar")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "xar.json")
    monkeypatch.setattr(module, "TABLE", tmp_path / "xar.md")
    return module


def test_every_method_gets_the_steps_that_fit_into_the_same_seconds(training):
    seconds = {"SiT": 0.08, "SiT, HASTE": 0.12, "xAR": 0.1, "xAR, REPA": 0.16, "xAR, HASTE": 0.15}
    steps = {method: training.steps_of(method, seconds) for method in training.METHODS}
    assert steps == {"SiT": 1000, "SiT, HASTE": 800, "xAR": 800, "xAR, REPA": 500, "xAR, HASTE": 650}
    args = training.Args(output_dir=Path("out"))
    haste = training.run_config(args, "xAR, HASTE", 1, 650)
    assert (haste.early_stop_point, haste.checkpointing_steps, haste.max_train_steps) == (325, 130, 650)
    assert haste.attn_coeff == 0.5 and haste.model == "xAR-Digits" and haste.exp_name == "xar-haste-seed1"
    assert not training.run_config(args, "SiT", 0, 1000).teachers


@pytest.mark.parametrize("script", ["digits", "digits_sampling"])
def test_the_tables_are_those_of_the_json(script):
    folder = BENCHMARKS / script
    with script_folder(folder):
        module = importlib.import_module("xar")
    assert module.write_up(module.read()) == (folder / "xar.md").read_text()


def test_settings_are_measured_once_and_written_up(sampling, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))
    monkeypatch.setattr(sampling, "FULL", replace(sampling.FULL, num_steps=6))
    monkeypatch.setattr(sampling, "SETTINGS", {
        "full": {}, "3 steps": {"num_steps": 3}, "forecast": {**sampling.FORECAST, "interval": 2},
        "stagger 2": {"stagger": 2},
    })  # fmt: skip
    write_xar_run(tmp_path).rename(tmp_path / "xar-seed0")
    args = sampling.Args(seeds=[0], runs=tmp_path, samples=70, batch=35)
    sampling.main(args)
    records = json.loads((tmp_path / "xar.json").read_text())["seeds"]["0"]
    assert {name: record["rounds"] for name, record in records.items() if "ode" in name} == {
        "ode: full": 24, "ode: 3 steps": 12, "ode: forecast": 24, "ode: stagger 2": 12,
    }  # fmt: skip
    assert records["ode: forecast"]["evaluations"] == 12 and records["sde: 3 steps"]["psnr"] is None
    assert records["sde: stagger 2"]["psnr"] > 5 and records["ode: full"]["psnr"] is None
    text = (tmp_path / "xar.md").read_text()
    assert text.count("\n| ODE: ") == text.count("\n| SDE: ") == 4

    monkeypatch.setattr(sampling.Sampler, "sample_batches", None)
    sampling.main(args)
    assert (tmp_path / "xar.md").read_text() == text

    sampling.main(replace(args, timing=True, timed_batches=[2], rounds=1))
    assert "× faster, batch 2" in (tmp_path / "xar.md").read_text()
