from __future__ import annotations

import json
import os

import numpy as np
import pytest
from digits_run import write_run
from haste.digits.classifier import ClassifierConfig, real_digits
from haste.errors import UserError
from haste.evaluation import evaluate as scores_module
from haste.evaluation.evaluate import append_record, evaluate_checkpoints, load_yardstick, read_records
from haste.evaluation.metrics import fit_gaussian, frechet_distance
from haste.generation.checkpoint import run_checkpoints
from haste.generation.config import SamplingConfig
from haste.training.checkpoint import as_before

SETTINGS = SamplingConfig(num_steps=2, labels="balanced")
COUNT = 70


@pytest.fixture(scope="module")
def yardstick(tmp_path_factory):
    return load_yardstick(tmp_path_factory.mktemp("classifier"), ClassifierConfig(epochs=4))


def test_the_real_digits_are_at_no_distance_and_noise_is_far(yardstick):
    images, labels = real_digits()
    real = yardstick.score(images, labels)
    assert real.fd == pytest.approx(0, abs=1e-8) and real.label_accuracy > 0.8 and real.samples == 1797
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    assert yardstick.score(noise, None).fd > 10 * yardstick.halves > 0


def test_a_score_is_the_distance_of_the_classifiers_features(yardstick):
    images, labels = real_digits()
    few, asked = images[:200], (labels[:200] + 1) % 10
    scored = yardstick.score(few, asked)
    features = yardstick.classifier(few).features
    assert scored.fd == frechet_distance(fit_gaussian(features), yardstick.real)
    assert scored.label_accuracy < 0.2 and yardstick.score(few, None).label_accuracy is None


def test_every_checkpoint_is_judged_once(tmp_path, yardstick, monkeypatch):
    run = write_run(tmp_path)
    first = evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, yardstick)
    assert [record["step"] for record in first] == [2, 4] and first[0]["fd"] != first[1]["fd"]
    assert read_records(run / "evaluation.jsonl") == first

    def refuse(*args):
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr(scores_module, "evaluate_checkpoint", refuse)
        assert evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, yardstick) == first
        with pytest.raises(AssertionError, match="evaluated again"):
            evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT + 1, yardstick)
        os.utime(run / "checkpoints" / "0000004.pt", ns=(1, 1))
        assert evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, yardstick) == first
        earlier = [as_before(record, run / "checkpoints" / record["checkpoint"]) for record in first]
        (run / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in earlier))
        assert evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, yardstick) == earlier
        write_run(tmp_path, steps=(4,), seed=1)  # trained again under the same name
        with pytest.raises(AssertionError, match="evaluated again"):
            evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, yardstick)


def test_what_was_judged_before_a_kill_is_kept(tmp_path, yardstick):
    run = write_run(tmp_path)
    checkpoints = run_checkpoints(run)
    first = evaluate_checkpoints(run, checkpoints[:1], SETTINGS, COUNT, yardstick)
    with (run / "evaluation.jsonl").open("a") as file:
        file.write('{"step": 4, "dist')  # cut short
    both = evaluate_checkpoints(run, checkpoints, SETTINGS, COUNT, yardstick)
    assert both[0] == first[0] and read_records(run / "evaluation.jsonl") == both


def test_progress_hears_of_every_image(tmp_path, yardstick):
    run = write_run(tmp_path)
    heard = []
    for _ in ("evaluated", "known"):
        evaluate_checkpoints(
            run, run_checkpoints(run), SETTINGS, COUNT, yardstick, lambda path, count: heard.append((path.stem, count))
        )
    assert heard == 2 * [("0000002", COUNT), ("0000004", COUNT)]


@pytest.mark.parametrize(
    ("data", "sentence"), [("imagenet", "was trained on 'imagenet'"), ("", "does not tell what it was trained on")]
)
def test_a_run_on_other_data_is_refused(tmp_path, yardstick, data, sentence):
    run = write_run(tmp_path, data_dir=data)
    with pytest.raises(UserError, match=f"0000002.pt {sentence}; the classifier knows digits only"):
        evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, yardstick)
    assert not (run / "evaluation.jsonl").exists()


def test_records_are_one_json_a_line(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    assert read_records(path) == []
    append_record(path, {"step": 1})
    append_record(path, {"step": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_lines_that_are_no_records_are_passed_over_and_kept(tmp_path, yardstick):
    run = write_run(tmp_path)
    first = evaluate_checkpoints(run, run_checkpoints(run)[:1], SETTINGS, COUNT, yardstick)
    path = run / "evaluation.jsonl"
    path.write_text(path.read_text() + json.dumps({**first[0], "fd": "far"}) + "\n[]\n")
    assert read_records(path) == first
    assert evaluate_checkpoints(run, run_checkpoints(run)[:1], SETTINGS, COUNT, yardstick) == first
