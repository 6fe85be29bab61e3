"""FDr: FDs in several networks, each divided by that of a baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation.config import EvaluateConfig
from haste.evaluation.records import keep_evaluation, read_evaluations
from haste.evaluation.relative import relative_fd
from haste.evaluation.runs import evaluate_config
from haste.metrics import evaluator as evaluator_module
from haste.metrics.evaluator import Evaluation, Result
from haste.metrics.features import Features
from mean_colours import MeanColours

SETTINGS = {"samples": "x", "count": 50, "dimension": 3, "reference": "real", "reference_count": 90}


def scored(network: str, fd: float | None, **changes) -> Evaluation:
    settings = {**SETTINGS, "features": network, "network": f"the network {network}", **changes}
    return Evaluation([Result("fd", fd, note=None if fd else "too few")], settings)


@pytest.fixture
def baseline(tmp_path) -> Path:
    """Held-out images whose FDs are 2 and 0.5."""
    for network, fd in (("a", 2.0), ("b", 0.5)):
        evaluation = scored(network, fd, samples="held_out")
        path = tmp_path / "held_out-evaluation.json"
        keep_evaluation(path, evaluation.settings, {"metrics": evaluation.record()})
    return tmp_path / "held_out.npz"


def test_it_is_the_mean_of_the_ratios(baseline):
    found = relative_fd([scored("a", 6.0), scored("b", 0.75)], baseline)
    assert found["fdr"].value == (6.0 / 2.0 + 0.75 / 0.5) / 2
    assert "3.000 in the network a, 1.500 in the network b" in found["fdr"].note
    assert found.settings["features"] == ["a", "b"] and found.settings["relative_to"] == str(baseline)
    assert str(found).splitlines()[0].split() == ["FDr", "2.250"]
    of_file = relative_fd([scored("a", 6.0)], baseline.with_name("held_out-evaluation.json"))
    assert of_file["fdr"].value == 3.0


def test_the_baseline_relative_to_itself_is_one(baseline):
    assert relative_fd([scored("a", 2.0), scored("b", 0.5)], baseline)["fdr"].value == 1.0


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (scored("c", 1.0), "scored in the features of the network c .* without them"),
        (scored("a", 1.0, count=60), "same settings in the features of the network a, .* with count 50, not 60"),
        (scored("a", 1.0, reference="other"), "with reference real, not other"),
        (scored("a", 1.0, reference_count=None), "with reference_count 90, not None"),
        (scored("a", None), "samples that have an FD, got none: too few"),
    ],
)
def test_another_way_of_scoring_is_refused_by_name(baseline, evaluation, message):
    with pytest.raises(UserError, match=f"--relative-to must .*{message}"):
        relative_fd([evaluation], baseline)


def test_a_baseline_without_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match="--relative-to must be samples that haste evaluate has scored, got .*nothing"):
        relative_fd([scored("a", 1.0)], tmp_path / "nothing")


class Corners(MeanColours):
    key = "corners"

    def __call__(self, images: np.ndarray) -> Features:
        return Features(images[:, 0, 0].astype(np.float64))


def test_the_command_scores_in_each_network_and_keeps_the_mean(tmp_path, monkeypatch):
    networks = {"colours": MeanColours(), "corners": Corners()}
    monkeypatch.setattr(evaluator_module, "load_extractor", lambda name, folder: networks[name])
    rng = np.random.default_rng(0)
    for name, top in (("real", 256), ("held_out", 250), ("samples", 200)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, top, (30, 8, 8, 3), dtype=np.uint8))
    both = {"features": "colours,corners", "reference": str(tmp_path / "real.npz"), "kid_subset_size": 10}
    evaluate_config(EvaluateConfig(samples=tmp_path / "held_out.npz", **both))
    config = EvaluateConfig(samples=tmp_path / "samples.npz", relative_to=tmp_path / "held_out.npz", **both)
    text = evaluate_config(config)
    fds = {
        (name, entry["settings"]["features"]): entry["metrics"]["fd"]["value"]
        for name in ("samples", "held_out")
        for entry in read_evaluations(tmp_path / f"{name}-evaluation.json")
        if "fd" in entry["metrics"]
    }
    expected = np.mean([fds["samples", key] / fds["held_out", key] for key in ("mean-colours", "corners")])
    kept = read_evaluations(tmp_path / "samples-evaluation.json")[-1]
    assert kept["metrics"]["fdr"]["value"] == pytest.approx(expected)
    assert f"FDr  {expected:.3f}" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "a,a"}, "--features must be different networks"),
        ({"features": "a,stored"}, "--features must be different networks"),
        ({"features": "a,b", "reference": "x,y,z"}, "--reference must be one, or one for each of the 2 networks"),
        ({"features": "a,b", "save_reference": Path("x.npz")}, "--features must be one network with --save-reference"),
        ({"features": "a,b", "samples": None, "run": Path("r")}, "--features must be one network with --run"),
        ({"relative_to": Path("b"), "samples": None, "run": Path("r")}, "--relative-to must come with --samples or"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**{"samples": tmp_path, **settings}).check()
