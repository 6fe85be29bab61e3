import numpy as np
import pytest
from haste.evaluation import evaluate
from haste.evaluation.evaluate import MetricConfig
from PIL import Image


@pytest.mark.parametrize(
    ("samples", "reference", "cautioned"),
    [(".jpg", ".png", True), (".jpg", ".jpeg", False), (".png", ".jpg", False), (".png", ".png", False)],
)
def test_jpeg_against_anything_else_gets_a_caution(
    tmp_path, network, monkeypatch, caplog, samples, reference, cautioned
):
    monkeypatch.setattr(evaluate, "load_extractor", lambda name, folder: network)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 8, 3), dtype=np.uint8)
    for folder, ending, images in zip(("samples", "reference"), (samples, reference), pixels, strict=True):
        (tmp_path / folder).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{index}{ending}")
    classifier = evaluate.Evaluator("x", str(tmp_path / "reference"), tmp_path, 8, MetricConfig(kid_subset_size=4))
    classifier.measure(tmp_path / "samples")
    assert ("samples holds JPEG files, and the reference is of none" in caplog.text) == cautioned
