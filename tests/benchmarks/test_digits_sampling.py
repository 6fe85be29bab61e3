"""The benchmark of cached sampling: its grid has what it promises, and it runs from models to the recommendation."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from digits_run import write_run
from haste import digits
from haste.digits import ClassifierConfig
from haste.sweep.config import Grid, plan
from haste.training.config import TrainConfig
from PIL import Image

FILE = Path(__file__).parents[2] / "benchmarks" / "digits_sampling" / "run.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("digits_sampling_run", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


def test_the_grid_has_every_setting_that_is_asked_for(benchmark):
    points = plan(benchmark.BASE, benchmark.GRIDS, benchmark.UNCACHED_STEPS)
    assert [point.num_steps for point in points if point.cache == "none"] == [50, 25, 20, 17, 14, 12, 10]
    taylorseer = [p for p in points if p.cache == "taylor" and p.granularity == "module"]
    assert {(p.interval, p.order) for p in taylorseer} == {(i, o) for i in (3, 4, 5, 6) for o in (1, 2, 3, 4)}
    seen = {(p.cache, None if p.cache == "delta-dit" else p.granularity) for p in points}
    assert seen >= {("newton", "module"), ("newton", "model"), ("taylor", "model"), ("taylor", "block"),
                    ("hermite", "model"), ("reuse", "model"), ("delta-dit", None)}  # fmt: skip
    assert all(point.num_steps == 50 for point in points if point.cache != "none")


def test_models_are_measured_and_written_up(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))
    monkeypatch.setattr(benchmark, "BASE", replace(benchmark.BASE, num_steps=6))
    monkeypatch.setattr(benchmark, "GRIDS", [Grid(caches=("taylor",), intervals=(2,), orders=(1,), steps=(6,))])
    monkeypatch.setattr(benchmark, "UNCACHED_STEPS", (3,))
    monkeypatch.setattr(benchmark, "train_to_end", None)  # the models are there
    last = TrainConfig.from_preset("digits").max_train_steps
    for seed in (0, 1):
        write_run(tmp_path, steps=(last,)).rename(tmp_path / f"haste-seed{seed}")
    counts = {"samples": 70, "batch": 35, "repeats": 1}
    args = benchmark.Args(seeds=[0, 1], runs=tmp_path, cfg_scale=1.5, output=tmp_path / "out", **counts)
    benchmark.main(args)
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [len(records) for records in document["records"].values()] == [3, 3]
    text = (tmp_path / "out" / "results.md").read_text()
    for name in ("6 uncached steps", "3 uncached steps", "Taylor per module, interval 2, order 1, 6 steps"):
        assert f"| {name} |" in text
    assert "EMA weights, guidance 1.5, the same noise" in text
    assert benchmark.RULE in text and "The fastest uncached run that is good enough" in text
    assert text.count(" ± 0.") >= 3
    Image.open(tmp_path / "out" / "results.png").verify()

    (tmp_path / "out" / "results.md").unlink()
    monkeypatch.setattr(benchmark, "measure", None)
    benchmark.main(replace(args, plot_only=True))
    assert (tmp_path / "out" / "results.md").read_text() == text
