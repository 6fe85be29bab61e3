from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from haste.errors import UserError
from haste.evaluation.evaluate import beside, evaluate
from haste.metrics import evaluator as evaluator_module
from haste.metrics.config import MetricConfig
from haste.metrics.formulas import fit_gaussian, frechet_distance
from PIL import Image


def test_images_in_memory_and_a_part_of_the_metrics(network, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluator_module, "load_extractor", lambda name, folder: network)
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images[:20])
    found = evaluate(images, "x", str(tmp_path / "reference.npz"), metrics=("fd", "recall"))
    assert [result.key for result in found.results] == ["fd", "recall"]
    expected = frechet_distance(fit_gaussian(network(images).values), fit_gaussian(network(images[:20]).values))
    assert found["fd"].value == pytest.approx(expected) and found.settings["count"] == 30
    assert "30 samples against 20 real images" in found.heading()


def test_images_of_another_shape_are_refused(network, monkeypatch):
    monkeypatch.setattr(evaluator_module, "load_extractor", lambda name, folder: network)
    with pytest.raises(UserError, match=r"samples must be images \(N, H, W, 3\) uint8, got float64 \(2, 8, 8, 3\)"):
        evaluate(np.zeros((2, 8, 8, 3)), "x", "digits")


FILES = {
    "png": (".png", {}),
    "jpeg": (".jpg", {}),
    "lossless webp": (".webp", {"lossless": True}),
    "lossy webp": (".webp", {"lossless": False}),
}


def write_images(folder: Path, kind: str, seed: int, count: int = 8) -> Path:
    """Random images in files of one kind; "npz" is arr_0, which may have been anything."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    if kind == "npz":
        np.savez(folder.with_suffix(".npz"), arr_0=images)
        return folder.with_suffix(".npz")
    ending, options = FILES[kind]
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}{ending}", **options)
    return folder


@pytest.mark.parametrize(
    ("samples", "reference", "lossy"),
    [
        ("jpeg", "png", "samples"),
        ("png", "jpeg", "the reference"),
        ("lossless webp", "lossy webp", "the reference"),
        ("lossy webp", "png", "samples"),
        ("jpeg", "lossy webp", None),
        ("png", "lossless webp", None),
        ("npz", "jpeg", None),
        ("jpeg", "npz", None),
    ],
)
def test_compression_with_loss_on_one_side_gets_one_caution(
    tmp_path, network, monkeypatch, caplog, samples, reference, lossy
):
    monkeypatch.setattr(evaluator_module, "load_extractor", lambda name, folder: network)
    paths = [write_images(tmp_path / name, kind, seed)
             for seed, (name, kind) in enumerate((("samples", samples), ("reference", reference)))]  # fmt: skip
    found = evaluate(paths[0], "x", str(paths[1]), config=MetricConfig(kid_subset_size=4))
    assert (found.caution is None) == (lossy is None)
    assert caplog.text.count("was compressed with loss") == (lossy is not None)
    assert lossy is None or found.caution.startswith(f"{lossy} was compressed with loss, as JPEG")


def test_a_folder_and_the_npz_of_its_images_share_a_record(tmp_path):
    (tmp_path / "run-cfg1.5").mkdir()
    expected = tmp_path / "run-cfg1.5-evaluation.json"
    assert beside(tmp_path / "run-cfg1.5", "evaluation.json") == expected
    assert beside(tmp_path / "run-cfg1.5.npz", "evaluation.json") == expected


def test_the_folder_that_one_stands_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert beside(Path("."), "features") == tmp_path / "here-features"
