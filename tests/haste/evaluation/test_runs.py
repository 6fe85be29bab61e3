from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
from digits_run import write_run
from haste.digits import ClassifierConfig, real_digits, train_classifier
from haste.errors import UserError
from haste.evaluation import evaluate as evaluate_module
from haste.evaluation import runs
from haste.evaluation.config import EvaluateConfig
from haste.evaluation.evaluate import Evaluator, evaluate
from haste.evaluation.reference import load_reference
from haste.evaluation.runs import (
    OF_CHECKPOINTS,
    append_record,
    evaluate_checkpoint,
    evaluate_checkpoints,
    keep_evaluation,
    read_evaluations,
    read_records,
)
from haste.generation.config import SamplingConfig
from haste.generation.pipeline import Sampler, load_checkpoint, run_checkpoints

SETTINGS = SamplingConfig(num_steps=2, labels="balanced")
COUNT = 70


@pytest.fixture(scope="module")
def evaluator():
    classifier = train_classifier(ClassifierConfig(epochs=4))
    return Evaluator(classifier, load_reference("digits", classifier, 512), batch_size=512)


def test_the_real_digits_are_at_no_distance_and_noise_is_far(evaluator):
    (images, labels), classifier = real_digits(), evaluator.extractor
    real = evaluator.values(classifier(images), labels, OF_CHECKPOINTS)
    assert real["fd"] == pytest.approx(0, abs=1e-8) and real["label_accuracy"] > 0.8
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    assert evaluator.values(classifier(noise), labels[:200], ("fd",))["fd"] > 10 * evaluator.split_half_fd > 0
    wrong = (labels[:200] + 1) % 10
    assert evaluator.values(classifier(images[:200]), wrong, OF_CHECKPOINTS)["label_accuracy"] < 0.2


def test_a_checkpoint_scores_as_its_images_do(tmp_path, evaluator, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_extractor", lambda name, folder: evaluator.extractor)
    loaded = load_checkpoint(write_run(tmp_path) / "checkpoints" / "0000002.pt")
    found = evaluate(loaded, "digits", "digits", sampling=SETTINGS, num_images=COUNT, batch_size=250)
    expected = evaluate_checkpoint(loaded.checkpoint, SETTINGS, COUNT, evaluator)
    by_path = evaluate(loaded.checkpoint, "digits", "digits", sampling=SETTINGS, num_images=COUNT, batch_size=250)
    assert by_path.record() == found.record()
    assert found["fd"].value == pytest.approx(expected["fd"], rel=1e-4)
    assert found["label_accuracy"].value == expected["label_accuracy"]
    images, labels = Sampler(loaded, SETTINGS).sample_batches(COUNT, 250)
    assert evaluate(images, "digits", "digits", labels=labels, batch_size=250).record() == found.record()


def test_every_checkpoint_is_judged_once(tmp_path, evaluator, monkeypatch):
    run = write_run(tmp_path)
    first = evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, evaluator)
    assert [record["step"] for record in first] == [2, 4] and first[0]["fd"] != first[1]["fd"]
    assert read_records(run / "evaluation.jsonl") == first

    def refuse(*args):
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "evaluate_checkpoint", refuse)
        assert evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, evaluator) == first
        with pytest.raises(AssertionError, match="evaluated again"):
            evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT + 1, evaluator)
        os.utime(run / "checkpoints" / "0000004.pt", ns=(1, 1))
        assert evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, evaluator) == first
        write_run(tmp_path, steps=(4,), seed=1)  # trained again under the same name
        with pytest.raises(AssertionError, match="evaluated again"):
            evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, evaluator)


def test_what_was_judged_before_a_kill_is_kept(tmp_path, evaluator):
    run = write_run(tmp_path)
    checkpoints = run_checkpoints(run)
    first = evaluate_checkpoints(run, checkpoints[:1], SETTINGS, COUNT, evaluator)
    with (run / "evaluation.jsonl").open("a") as file:
        file.write('{"step": 4, "dist')  # cut short
    both = evaluate_checkpoints(run, checkpoints, SETTINGS, COUNT, evaluator)
    assert both[0] == first[0] and read_records(run / "evaluation.jsonl") == both


def test_progress_hears_of_every_image(tmp_path, evaluator):
    run = write_run(tmp_path)
    heard = []
    for _ in ("evaluated", "known"):
        evaluate_checkpoints(
            run, run_checkpoints(run), SETTINGS, COUNT, evaluator, lambda path, count: heard.append((path.stem, count))
        )
    assert heard == 2 * [("0000002", COUNT), ("0000004", COUNT)]


@pytest.mark.parametrize(("data", "named"), [("imagenet", "'imagenet'"), ("", "unknown data")])
def test_a_run_on_other_data_is_refused(tmp_path, evaluator, data, named):
    run = write_run(tmp_path, data_dir=data)
    with pytest.raises(UserError, match=f"--features and --reference .*0000002.pt of {named}"):
        evaluate_checkpoints(run, run_checkpoints(run), SETTINGS, COUNT, evaluator)
    assert not (run / "evaluation.jsonl").exists()


def test_records_are_one_json_a_line(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    assert read_records(path) == []
    append_record(path, {"step": 1})
    append_record(path, {"step": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_lines_that_are_no_records_are_passed_over_and_kept(tmp_path, evaluator):
    run = write_run(tmp_path)
    first = evaluate_checkpoints(run, run_checkpoints(run)[:1], SETTINGS, COUNT, evaluator)
    path = run / "evaluation.jsonl"
    path.write_text(path.read_text() + json.dumps({**first[0], "fd": "far"}) + "\n[]\n")
    assert read_records(path) == first
    assert evaluate_checkpoints(run, run_checkpoints(run)[:1], SETTINGS, COUNT, evaluator) == first


# ---- evaluation.json ----


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


def test_too_few_samples_are_refused_before_a_classifier_is_trained(tmp_path):
    run = write_run(tmp_path)
    with pytest.raises(UserError, match="--num-fid-samples must be above 64, .* got 60"):
        runs.evaluate_by_classifier(EvaluateConfig(run=run, num_steps=2, num_fid_samples=60))
    assert not (tmp_path / "classifier").exists()


def test_images_of_no_class_have_no_accuracy_to_follow(tmp_path):
    with pytest.raises(UserError, match="--labels must be classes with --run"):
        runs.evaluate_by_classifier(EvaluateConfig(run=write_run(tmp_path), num_steps=2, labels="none"))
    assert not (tmp_path / "classifier").exists()


def test_a_run_that_cannot_be_written_is_refused_before_anything_is_sampled(tmp_path):
    run = write_run(tmp_path)
    (run / ".evaluation.jsonl.lock").mkdir()
    with pytest.raises(UserError, match="evaluation.jsonl cannot be written"):
        runs.evaluate_by_classifier(EvaluateConfig(run=run, num_steps=2, num_fid_samples=70))
    assert not (tmp_path / "classifier").exists()


def test_the_reference_of_a_run_is_saved(tmp_path, evaluator, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_extractor", lambda name, folder: evaluator.extractor)
    saved = tmp_path / "ref.npz"
    config = EvaluateConfig(run=write_run(tmp_path), num_steps=2, num_fid_samples=70, save_reference=saved)
    runs.evaluate_by_classifier(config)
    with np.load(saved) as arrays:
        assert np.allclose(arrays["mu"], evaluator.reference.gaussian.mean)


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
