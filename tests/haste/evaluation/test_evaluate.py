from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation import evaluate as evaluate_module
from haste.evaluation.config import MetricConfig
from haste.evaluation.evaluate import (
    NAMES,
    Evaluation,
    Evaluator,
    Result,
    beside,
    evaluate,
)
from haste.evaluation.features import Features
from haste.evaluation.metrics import Gaussian, fit_gaussian, frechet_distance, inception_score, kid, prdc
from haste.evaluation.reference import Reference
from haste.evaluation.runs import checkpoints_text
from PIL import Image

SETTINGS = MetricConfig(kid_subsets=5, kid_subset_size=100)


def features(count: int, dimension: int = 3, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)) + shift


def reference(values: np.ndarray) -> Reference:
    return Reference("real", "network", values)


def measure(samples: Features, against: Reference, config: MetricConfig, labels=None) -> list[Result]:
    network = None if labels is None else Classes()
    return Evaluator(network, against, config).score(samples, labels)


class Classes:
    """As much of a classifier of the data as scoring needs."""

    classes = 4


def by_key(results: list[Result]) -> dict[str, Result]:
    return {result.key: result for result in results}


def test_every_metric_is_that_of_its_own_file():
    a, b = features(1200), features(1000, seed=1, shift=0.3)
    probabilities = np.random.default_rng(2).dirichlet(np.ones(4), 1200)
    labels = np.zeros(1200, dtype=int)
    found = by_key(measure(Features(a, probabilities), reference(b), SETTINGS, labels))
    assert list(found) == list(NAMES)
    assert found["fd"].value == frechet_distance(fit_gaussian(a), fit_gaussian(b))
    kernel = kid(a, b, subsets=5, subset_size=100)
    assert (found["kid"].value, found["kid"].spread) == kernel
    scores = prdc(a, b)
    for key in ("precision", "recall", "density", "coverage"):
        assert found[key].value == getattr(scores, key) and found[key].note is None
    score = inception_score(probabilities)
    assert (found["inception_score"].value, found["inception_score"].spread) == score
    assert found["label_accuracy"].value == np.mean(probabilities.argmax(axis=1) == 0)


def test_statistics_alone_allow_the_frechet_distance_alone():
    stored = Reference("real", "network", None, Gaussian(np.zeros(3), np.eye(3), None))
    found = by_key(measure(Features(features(1000)), stored, SETTINGS))
    assert found["fd"].value < 0.1 and found["fd"].note is None
    for key in ("kid", "precision", "recall", "density", "coverage"):
        assert found[key].value is None and "only mean and covariance are stored" in found[key].note
    assert found["inception_score"].note == "these features come without class probabilities"
    assert "label_accuracy" not in found


def test_too_few_images_are_refused_metric_by_metric():
    found = by_key(measure(Features(features(8, 16)), reference(features(2000, 16)), SETTINGS))
    assert "8 samples are too few for an FD in 16" in found["fd"].note
    assert "--kid-subset-size must be from 2 to 8" in found["kid"].note
    assert found["fd"].value is found["kid"].value is None
    assert found["precision"].value is not None and "rest on 8 images" in found["precision"].note
    few = by_key(measure(Features(features(2000, 16)), reference(features(9, 16)), SETTINGS))
    assert "9 real images are too few" in few["fd"].note


def test_few_images_come_with_a_caution():
    probabilities = np.full((100, 4), 0.25)
    found = by_key(measure(Features(features(100, 16), probabilities), reference(features(120, 16)), SETTINGS))
    for side in ("100 samples in 16", "120 real images in 16"):
        assert f"rests on {side} feature dimensions and is biased upwards" in found["fd"].note
    assert "rest on 100 images" in found["recall"].note
    assert "rests on 100 samples and is biased downwards; use at least 5,000" in found["inception_score"].note


def test_two_networks_are_refused():
    with pytest.raises(UserError, match="samples and the reference must .* 3 dimensions for samples and 4 for real"):
        measure(Features(features(50)), reference(features(50, 4)), SETTINGS)


def test_the_table_says_each_thing_once():
    text = str(Evaluation(measure(Features(features(100)), reference(features(150)), MetricConfig()), {}))
    lines = text.splitlines()
    assert lines[1].split() == ["KID", "–"]
    assert sum("No KID: --kid-subset-size" in line for line in lines) == 1
    assert sum("rest on 100 images" in line for line in lines) == 1


def test_checkpoints_are_rows_and_what_none_of_them_has_is_no_column():
    real = reference(features(300))
    rows = [(str(step), measure(Features(features(300, seed=step)), real, SETTINGS)) for step in (1, 2)]
    head, first, second, *notes = checkpoints_text(rows).splitlines()
    assert "FD" in head and "Inception score" not in head
    assert first.split()[0] == "1" and second.split()[0] == "2"
    assert sum("No Inception score" in note for note in notes) == 1


def test_images_in_memory_and_a_part_of_the_metrics(network, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_module, "load_extractor", lambda name, folder: network)
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images[:20])
    found = evaluate(images, "x", str(tmp_path / "reference.npz"), metrics=("fd", "recall"))
    assert [result.key for result in found.results] == ["fd", "recall"]
    expected = frechet_distance(fit_gaussian(network(images).values), fit_gaussian(network(images[:20]).values))
    assert found["fd"].value == pytest.approx(expected) and found.settings["count"] == 30
    assert "30 samples against 20 real images" in found.heading()


def test_labels_and_images_of_another_shape_are_refused(network, monkeypatch):
    with pytest.raises(UserError, match=r"labels must be \(60,\), one for each image, got \(59,\)"):
        Evaluator(Classes(), reference(features(50))).score(Features(features(60)), np.zeros(59))
    monkeypatch.setattr(evaluate_module, "load_extractor", lambda name, folder: network)
    with pytest.raises(UserError, match=r"samples must be images \(N, H, W, 3\) uint8, got float64 \(2, 8, 8, 3\)"):
        evaluate(np.zeros((2, 8, 8, 3)), "x", "digits")


def test_metrics_of_no_such_name_are_refused():
    with pytest.raises(UserError, match="metrics must be some of fd, kid, .*, got fid, swd"):
        Evaluator(None, reference(features(50))).score(Features(features(60)), metrics=["swd", "fd", "fid"])


def test_as_plain_numbers_what_cannot_be_had_is_an_error():
    evaluator = Evaluator(Classes(), reference(features(50)))
    probabilities = np.eye(4)[np.zeros(60, int)]
    found = evaluator.values(Features(features(60), probabilities), np.zeros(60), ("fd", "label_accuracy"))
    assert found["fd"] > 0 and found["label_accuracy"] == 1.0
    with pytest.raises(UserError, match="2 samples are too few"):
        evaluator.values(Features(features(2), probabilities[:2]), np.zeros(2), ("fd",))
    nothing = evaluator.values(Features(features(60), probabilities), np.full(60, 4), ("fd", "label_accuracy"))
    assert nothing == {"fd": found["fd"], "label_accuracy": None}  # of no class
    alone = Evaluator(None, reference(features(50))).values(
        Features(features(60)), np.zeros(60), ("fd", "label_accuracy")
    )
    assert alone == {"fd": found["fd"], "label_accuracy": None}


@pytest.mark.parametrize(
    ("samples", "reference", "cautioned"),
    [(".jpg", ".png", True), (".jpg", ".jpeg", False), (".png", ".jpg", False), (".png", ".png", False)],
)
def test_jpeg_against_anything_else_gets_a_caution(
    tmp_path, network, monkeypatch, caplog, samples, reference, cautioned
):
    monkeypatch.setattr(evaluate_module, "load_extractor", lambda name, folder: network)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 8, 3), dtype=np.uint8)
    for folder, ending, images in zip(("samples", "reference"), (samples, reference), pixels, strict=True):
        (tmp_path / folder).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{index}{ending}")
    evaluate(tmp_path / "samples", "x", str(tmp_path / "reference"), config=MetricConfig(kid_subset_size=4))
    assert ("samples holds JPEG files" in caplog.text) == cautioned


def test_a_folder_and_the_npz_of_its_images_share_a_record(tmp_path):
    (tmp_path / "run-cfg1.5").mkdir()
    expected = tmp_path / "run-cfg1.5-evaluation.json"
    assert beside(tmp_path / "run-cfg1.5", "evaluation.json") == expected
    assert beside(tmp_path / "run-cfg1.5.npz", "evaluation.json") == expected


def test_the_folder_that_one_stands_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert beside(Path("."), "features") == tmp_path / "here-features"


def test_metrics_are_plain_values():
    record = Evaluation(
        [Result("precision", 0.5), Result("kid", None, note="too few"), Result("recall", 1.0, 0.0)], {}
    ).record()
    assert record == {
        "precision": {"value": 0.5},
        "kid": {"value": None, "note": "too few"},
        "recall": {"value": 1.0, "spread": 0.0},
    }
    assert json.loads(json.dumps(record)) == record
