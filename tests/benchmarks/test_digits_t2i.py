"""The benchmark of text to image on the digits: its runs, and from a run to the table."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_scripts import script_folder
from haste import digits
from haste.digits import ClassifierConfig
from haste.training.config import TrainConfig
from text_run import write_text_run

FOLDER = Path(__file__).parents[2] / "benchmarks" / "digits"


@pytest.fixture
def t2i():
    with script_folder(FOLDER):
        yield importlib.import_module("t2i")


def test_runs_differ_in_their_coefficients_alone(t2i):
    args = t2i.Args(output_dir=Path("out"))
    baseline, repa, haste = (t2i.run_config(args, method, 1) for method in ("baseline", "REPA", "HASTE"))
    assert not baseline.teachers and repa.aligns_features and not repa.aligns_attention and haste.aligns_attention
    assert repa.early_stop_point == -1 and 0 < haste.early_stop_point < haste.max_train_steps
    assert haste.exp_name == "haste-seed1" and haste.max_train_steps == 5 * haste.checkpointing_steps
    same = {"attn_coeff": 0.0, "proj_coeff": 0.0, "exp_name": baseline.exp_name}
    assert replace(haste, **same) == baseline


def test_the_table_is_that_of_the_json(t2i):
    assert t2i.write_up(t2i.read()) == t2i.TABLE.read_text()


def test_a_run_is_scored_once_and_written_up(t2i, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "ClassifierConfig", lambda: ClassifierConfig(epochs=1))
    monkeypatch.setattr(t2i, "SETTINGS", replace(t2i.SETTINGS, num_steps=2))
    monkeypatch.setattr(t2i, "SAMPLES", 160)
    for name in ("RESULTS", "TABLE", "PLOT"):
        monkeypatch.setattr(t2i, name, tmp_path / getattr(t2i, name).name)
    settings = TrainConfig(output_dir=str(tmp_path), exp_name="run", data_dir="digits-captions", resolution=8)
    trained = []

    def train_to_end(config):
        trained.append(config)
        return write_text_run(tmp_path, (2, 4), args=settings.to_namespace())

    monkeypatch.setattr(t2i, "train_to_end", train_to_end)
    args = t2i.Args(methods=["REPA"], seeds=[0], output_dir=tmp_path)
    t2i.main(args)
    (run,) = json.loads((tmp_path / "t2i.json").read_text())["runs"]
    assert [point["step"] for point in run["points"]] == [2, 4] and len(trained) == 1
    text = (tmp_path / "t2i.md").read_text()
    assert f"| REPA | {run['points'][0]['fd']:,.2f} |" in text and "held out: weight" in text
    t2i.main(args)
    assert len(trained) == 1 and (tmp_path / "t2i.md").read_text() == text and (tmp_path / "t2i.png").is_file()
