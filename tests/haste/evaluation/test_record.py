from __future__ import annotations

import json
from pathlib import Path

import pytest
from haste.errors import UserError
from haste.evaluation.evaluate import Result, beside, keep_evaluation, metrics_record, read_evaluations


def test_a_folder_and_the_npz_of_its_images_share_a_record(tmp_path):
    (tmp_path / "run-cfg1.5").mkdir()
    expected = tmp_path / "run-cfg1.5-evaluation.json"
    assert beside(tmp_path / "run-cfg1.5", "evaluation.json") == expected
    assert beside(tmp_path / "run-cfg1.5.npz", "evaluation.json") == expected


def test_the_folder_that_one_stands_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert beside(Path("."), "features") == tmp_path / "here-features"


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
    with pytest.raises(UserError, match="must be the evaluations of samples, and is no JSON"):
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


def test_metrics_are_plain_values():
    record = metrics_record([Result("precision", 0.5), Result("kid", None, note="too few")])
    assert record == {"precision": {"value": 0.5}, "kid": {"value": None, "note": "too few"}}
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("content", ["[]", "{}", '{"evaluations": 3}', '{"evaluations": [1]}', '{"evaluations": [{}]}'])
def test_json_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "x-evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match="must be the evaluations of samples"):
        read_evaluations(path)
