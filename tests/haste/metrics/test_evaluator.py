from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
from haste.data.images import ImageArray
from haste.errors import UserError
from haste.evaluation.runs import checkpoints_text
from haste.metrics.config import MetricConfig
from haste.metrics.evaluator import NAMES, Evaluation, Evaluator, Result
from haste.metrics.features import Features
from haste.metrics.formulas import Gaussian, fit_gaussian, frechet_distance, inception_score, kid, prdc
from haste.metrics.reference import Reference, load_reference, save_reference
from mean_colours import MeanColours

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
    real = Reference("real", "network", b, spatial=fit_gaussian(b[:, :2]))
    found = by_key(measure(Features(a, probabilities, a[:, :2]), real, SETTINGS, labels))
    assert list(found) == list(NAMES)
    assert found["sfid"].value == frechet_distance(fit_gaussian(a[:, :2]), fit_gaussian(b[:, :2]))
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


def test_labels_of_another_number_are_refused():
    with pytest.raises(UserError, match=r"labels must be \(60,\), one for each image, got \(59,\)"):
        Evaluator(Classes(), reference(features(50))).score(Features(features(60)), np.zeros(59))


def test_metrics_of_no_such_name_are_refused():
    with pytest.raises(UserError, match="metrics must be some of fd, sfid, kid, .*, got fid, swd"):
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


# ---- sFID ----


class Spatial(MeanColours):
    """MeanColours with spatial features, one of four pixels in red."""

    spatial = True

    def __call__(self, images: np.ndarray) -> Features:
        found = super().__call__(images)
        return Features(found.values, found.probabilities, images[:, ::4, ::4, 0].reshape(len(images), -1) / 8.0)


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200 + 10 * seed, (count, 8, 8, 3), dtype=np.uint8)


def sfid_of(network: MeanColours, path) -> Result | None:
    """sFID of 40 images against a reference file."""
    evaluator = Evaluator(network, load_reference(str(path), network))
    return by_key(evaluator.of_images(ImageArray(images(40, 1)), "samples", None, ("fd", "sfid")).results).get("sfid")


def adm_distance(a: np.ndarray, b: np.ndarray) -> float:
    """ADM's evaluator: np.cov, and the root of the product of covariances by scipy."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(
        np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root)
    )


def test_sfid_is_adms_formula_from_images_and_from_their_statistics(tmp_path):
    network = Spatial()
    found = {seed: network(images(count, seed)) for seed, count in ((1, 40), (2, 50))}
    expected = adm_distance(found[1].spatial, found[2].spatial)
    np.savez(tmp_path / "images.npz", arr_0=images(50, 2))
    assert sfid_of(network, tmp_path / "images.npz").value == pytest.approx(expected, rel=1e-9)
    save_reference(tmp_path / "own.npz", load_reference(str(tmp_path / "images.npz"), network))
    assert sfid_of(network, tmp_path / "own.npz").value == pytest.approx(expected, rel=1e-9)
    moments = {}  # as in ADM's files
    for end, values in (("", found[2].values), ("_s", found[2].spatial)):
        moments |= {f"mu{end}": values.mean(axis=0), f"sigma{end}": np.cov(values, rowvar=False)}
    np.savez(tmp_path / "adm.npz", **moments)
    np.savez(tmp_path / "virtual.npz", **moments, arr_0=images(9, 3))  # statistics of more images than it holds
    for name in ("adm.npz", "virtual.npz"):
        assert sfid_of(network, tmp_path / name).value == pytest.approx(expected, rel=1e-9)


def test_without_its_statistics_sfid_is_left_out_with_the_reason(tmp_path):
    network = Spatial()
    values = network(images(50, 2)).values
    statistics = {"mu": values.mean(axis=0), "sigma": np.cov(values, rowvar=False)}
    np.savez(tmp_path / "old.npz", **statistics)
    np.savez(tmp_path / "old_with_images.npz", **statistics, arr_0=images(50, 2))  # whose FD is of the statistics
    for name in ("old.npz", "old_with_images.npz"):
        result = sfid_of(network, tmp_path / name)
        assert result.value is None and "the reference has no mu_s and sigma_s" in result.note
    np.savez(tmp_path / "few.npz", arr_0=images(4, 2))
    assert "4 real images are too few for an FD in 4 feature dimensions" in sfid_of(network, tmp_path / "few.npz").note


def test_a_network_without_spatial_features_has_no_sfid(network, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=images(50, 2))
    assert sfid_of(network, tmp_path / "images.npz") is None


def test_broken_statistics_of_spatial_features_are_refused(tmp_path):
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(tmp_path / "bad.npz", **good, mu_s=np.zeros(4), sigma_s=np.eye(5))
    with pytest.raises(UserError, match=r"--reference must hold .* mu_s and sigma_s must be \(D,\) and \(D, D\)"):
        load_reference(str(tmp_path / "bad.npz"), Spatial())
    np.savez(tmp_path / "other.npz", **good, mu_s=np.zeros(5), sigma_s=np.eye(5))
    assert "got 4 and 5 dimensions" in sfid_of(Spatial(), tmp_path / "other.npz").note
