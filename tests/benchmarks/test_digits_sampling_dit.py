"""The benchmark of a DiT's forecasts: from models to the tables, and again from what is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_scripts import script_folder
from digits_run import write_run
from haste.training.config import TrainConfig

with script_folder(Path(__file__).parents[2] / "benchmarks" / "digits_sampling"):
    import dit


def test_the_grid_has_every_setting_that_is_asked_for():
    points = set(dit.points())
    ddim = [point for point in points if point.sampler == "ddim" and point.cache != "none"]
    for spacing in ("linspace", "leading"):
        full = {point.full for point in ddim if point.spacing == spacing}
        assert full == {14, 9} and all(point.settings.mode == "ddim" for point in ddim)
        kinds = {(p.cache, p.granularity, p.order) for p in ddim if p.spacing == spacing and p.full == 14}
        assert kinds == {(c, g, o) for c in ("taylor", "newton") for g in dit.GRANULARITIES for o in (1, 2, 3, 4)}
    assert {p.full for p in points if p.cache == "none"} == {14, 9}
    assert {(p.steps, p.order) for p in points if p.sampler == "ddpm"} == {
        (s, o) for s in (50, 250) for o in (0, 1, 2, 4)
    }


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few points of one seed, whose model is there."""
    last = TrainConfig.from_preset("dit-digits").max_train_steps
    write_run(tmp_path, steps=(last,), preset="dit-digits").rename(tmp_path / "dit-haste-seed0")
    for name, value in {
        "RESULTS": tmp_path / "dit.json", "TABLES": tmp_path / "dit.md", "RULES": ((25, 2),), "ORDERS": (1,),
        "GRANULARITIES": ("model", "output"), "NOISY_STEPS": (50,), "NOISY_GRANULARITIES": ("model",),
        "NOISY_FORECASTS": (("reuse", 0),),
    }.items():  # fmt: skip
        monkeypatch.setattr(dit, name, value)
    return dit.Args(seeds=[0], runs=tmp_path, samples=2)


def test_models_are_measured_and_written_up(small, tmp_path, monkeypatch, capsys):
    dit.main(small)
    document = json.loads((tmp_path / "dit.json").read_text())
    assert document["columns"][0] == "sampler" and len(document["seeds"]["0"]) == 2 * 4 + 1 + 1  # 3 full: not leading
    assert all(0 < row[-1] < 200 for row in document["seeds"]["0"])
    text = (tmp_path / "dit.md").read_text()
    assert "## DDIM, 50 steps, linspace, interval 25, first 2: 3 full; 3 uncached steps: " in text
    assert "## DDPM, 50 steps, interval 4, first 2: 14 full" in text and text in capsys.readouterr().out
    monkeypatch.setattr(dit.Sampler, "run", None)  # all is known
    dit.main(small)
    assert json.loads((tmp_path / "dit.json").read_text())["seeds"] == document["seeds"]
