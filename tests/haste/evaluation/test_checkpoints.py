"""The checkpoints of a run: each is scored once, by the classifier or by the reading of its prompts."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from digits_run import write_run
from haste.digits import ClassifierConfig, real_digits, train_classifier
from haste.digits.reader import DigitsReader
from haste.errors import UserError
from haste.evaluation import checkpoints
from haste.evaluation.checkpoints import (
    OF_CHECKPOINTS,
    append_record,
    evaluate_by_classifier,
    evaluate_checkpoint,
    evaluate_checkpoints,
    read_records,
)
from haste.evaluation.config import EvaluateConfig
from haste.evaluation.evaluate import evaluate
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint, run_checkpoints
from haste.generation.pipeline import Sampler
from haste.metrics import evaluator as evaluator_module
from haste.metrics.evaluator import Evaluator
from haste.metrics.reference import load_reference
from haste.training.config import TrainConfig
from text_run import write_text_run

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
    monkeypatch.setattr(evaluator_module, "load_extractor", lambda name, folder: evaluator.extractor)
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
    assert SETTINGS.mode is None and first[0]["mode"] == "ode"  # as records have it from before there was a choice
    assert read_records(run / "evaluation.jsonl") == first

    def refuse(*args):
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "evaluate_checkpoint", refuse)
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


def test_too_few_samples_are_refused_before_a_classifier_is_trained(tmp_path):
    run = write_run(tmp_path)
    with pytest.raises(UserError, match="--num-fid-samples must be above 64, .* got 60"):
        evaluate_by_classifier(EvaluateConfig(run=run, num_steps=2, num_fid_samples=60))
    assert not (tmp_path / "classifier").exists()


def test_images_of_no_class_have_no_accuracy_to_follow(tmp_path):
    with pytest.raises(UserError, match="--labels must be classes with --run"):
        evaluate_by_classifier(EvaluateConfig(run=write_run(tmp_path), num_steps=2, labels="none"))
    assert not (tmp_path / "classifier").exists()


def test_a_run_that_cannot_be_written_is_refused_before_anything_is_sampled(tmp_path):
    run = write_run(tmp_path)
    (run / ".evaluation.jsonl.lock").mkdir()
    with pytest.raises(UserError, match="evaluation.jsonl cannot be written"):
        evaluate_by_classifier(EvaluateConfig(run=run, num_steps=2, num_fid_samples=70))
    assert not (tmp_path / "classifier").exists()


def test_the_reference_of_a_run_is_saved(tmp_path, evaluator, monkeypatch):
    monkeypatch.setattr(evaluator_module, "load_extractor", lambda name, folder: evaluator.extractor)
    saved = tmp_path / "ref.npz"
    config = EvaluateConfig(run=write_run(tmp_path), num_steps=2, num_fid_samples=70, save_reference=saved)
    evaluate_by_classifier(config)
    with np.load(saved) as arrays:
        assert np.allclose(arrays["mu"], evaluator.reference.gaussian.mean)


# ---- runs on captions ----


@pytest.fixture(scope="module")
def reader(evaluator):
    extractor = DigitsReader(evaluator.extractor)
    return Evaluator(extractor, load_reference("digits-captions", extractor, 512), batch_size=512)


@pytest.fixture
def text_run(tmp_path):
    settings = TrainConfig(output_dir=str(tmp_path), exp_name="run", data_dir="digits-captions", resolution=8)
    return write_text_run(tmp_path, (2, 4), args=settings.to_namespace())


def test_samples_of_prompts_are_read_once(text_run, reader, monkeypatch):
    settings = SamplingConfig(num_steps=2)
    records = evaluate_checkpoints(text_run, run_checkpoints(text_run), settings, 160, reader)
    for record in records:
        assert record["read"].keys() == reader.extractor.rates.keys() and record["fd"] > 0
        assert all(0 <= rate <= 1 for rate in record["read"].values()) and "label_accuracy" not in record
        assert record["prompts"].startswith("160 prompts")
    assert read_records(text_run / "evaluation.jsonl") == records
    monkeypatch.setattr(checkpoints, "evaluate_checkpoint", lambda *args: pytest.fail("evaluated again"))
    assert evaluate_checkpoints(text_run, run_checkpoints(text_run), settings, 160, reader) == records


def test_rates_are_those_of_the_samples(text_run, reader):
    settings = SamplingConfig(num_steps=2, prompts="a bold seven, leaning right\na zero\n")
    loaded = load_checkpoint(text_run)
    record = evaluate_checkpoint(loaded.checkpoint, settings, 70, reader)
    images = Sampler(loaded, settings).sample_batches(70, 250)[0]
    looks = reader.extractor.looks(images)
    assert record["read"]["held_out_all"] is None
    assert record["read"]["seen_all"] == np.mean([look == (7, "right", "bold") for look in looks[::2]])
    assert record["read"]["seen_digit"] == np.mean([look.digit == (7, 0)[n % 2] for n, look in enumerate(looks)])


def test_a_run_on_captions_is_plotted_and_written_up(text_run, reader, monkeypatch):
    monkeypatch.setattr(evaluator_module, "load_extractor", lambda name, folder: reader.extractor)
    config = EvaluateConfig(run=text_run, num_steps=2, num_fid_samples=70)
    records, evaluator = evaluate_by_classifier(config)
    assert (text_run / "evaluation.png").is_file()
    text = checkpoints.records_text(records, evaluator)
    table = text.splitlines()
    assert "all, held out" in table[0] and len(table[1].split()) == 2 + len(reader.extractor.rates)
    assert f"{records[0]['fd']:.3f}" in table[1]
