from __future__ import annotations

import sys

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation import runs
from haste.evaluation.config import EvaluateConfig
from haste.evaluation.records import keep_evaluation, read_evaluations
from haste.metrics.evaluator import Evaluator


def test_the_same_settings_replace_their_entry_and_others_are_added(tmp_path):
    path = tmp_path / "x-evaluation.json"
    assert read_evaluations(path) == []
    keep_evaluation(path, {"seed": 0, "shape": (8, 8)}, {"metrics": 1})
    keep_evaluation(path, {"seed": 1}, {"metrics": 2})
    keep_evaluation(path, {"seed": 0, "shape": (8, 8)}, {"metrics": 3})
    entries = read_evaluations(path)
    assert [(entry["settings"]["seed"], entry["metrics"]) for entry in entries] == [(1, 2), (0, 3)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_of_something_else_is_not_written_over(tmp_path):
    path = tmp_path / "x-evaluation.json"
    path.write_text("mine")
    with pytest.raises(UserError, match="must be the evaluations of samples, but is no JSON"):
        keep_evaluation(path, {}, {})
    assert path.read_text() == "mine"


def test_a_full_disk_spares_what_was_measured_before(tmp_path, monkeypatch):
    path = tmp_path / "x-evaluation.json"
    keep_evaluation(path, {"seed": 0}, {"metrics": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("haste.io.os.fsync", full)
    with pytest.raises(UserError, match="x-evaluation.json cannot be written: No space left on device; what was meas"):
        keep_evaluation(path, {"seed": 1}, {"metrics": 2})
    assert [entry["metrics"] for entry in read_evaluations(path)] == [1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", ["[]", "{}", '{"evaluations": 3}', '{"evaluations": [1]}', '{"evaluations": [{}]}'])
def test_json_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "x-evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match="must be the evaluations of samples"):
        read_evaluations(path)


def test_samples_that_allow_no_metric_are_refused_unless_they_have_a_baseline(tmp_path, capsys):
    for name, count in (("one", 1), ("real", 9)):
        images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        np.savez(tmp_path / f"{name}_features.npz", features=images.reshape(count, -1).astype(np.float32))
    stored = {"samples": tmp_path / "one_features.npz", "features": "stored"}
    with pytest.raises(UserError, match="--samples must be enough for one metric at least, got .* with 1: No "):
        runs.evaluate_samples(EvaluateConfig(**stored, reference=str(tmp_path / "real_features.npz")))
    pair = EvaluateConfig(samples=tmp_path / "one.npz", baseline=str(tmp_path / "one.npz"))
    assert "SSIM" in runs.compare_with_baseline(pair, pair.baseline, pair.samples, None)[1]


def test_a_caution_is_logged_not_printed(tmp_path, capsys, caplog):
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8))
    Evaluator.load("digits", str(tmp_path / "real.npz"), tmp_path, samples=70)
    assert "rests on 70 samples" in caplog.text and capsys.readouterr().out == ""


def test_a_missing_package_is_named_before_a_baseline_is_compared(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    config = EvaluateConfig(samples=tmp_path / "a.npz", baseline=str(tmp_path / "a.npz"))
    with pytest.raises(UserError, match=r"pip install 'haste\[eval\]'"):
        runs.evaluate_config(config)
