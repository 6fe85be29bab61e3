from __future__ import annotations

import json

import numpy as np
import pytest
from digits_run import write_run
from haste.data.images import write_image, write_npz
from haste.errors import UserError
from haste.evaluation.fidelity import (
    Fidelity,
    compare_images,
    compare_sets,
    fidelity_text,
    step_errors,
    steps_text,
    summarise_steps,
)
from haste.generation.config import SamplingConfig
from haste.generation.loaded import load_checkpoint
from haste.generation.pipeline import Sampler


def random_images(count: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(50, 200, (count, size, size, 3), dtype=np.uint8)


def write_set(folder, images, **settings) -> None:
    for index, image in enumerate(images):
        write_image(folder / f"{index:06d}.png", image)
    (folder / "sample.json").write_text(json.dumps({"settings": settings, "drawn": {}}))


@pytest.mark.parametrize("size", [8, 16])
def test_an_error_of_one_size_everywhere_has_its_psnr(size):
    images = random_images(3, size)
    found = compare_images(images, images + 5)
    assert found.psnr == pytest.approx(np.full(3, 10 * np.log10(255**2 / 25)), rel=1e-9)
    assert (found.ssim < 1).all() and (found.ssim > 0.98).all()


def test_ssim_of_constant_images_has_its_closed_form():
    """Without structure only luminance is compared: (2ab + c) / (a² + b² + c), c = (0.01·255)²."""
    a, b, c = 100.0, 120.0, (0.01 * 255) ** 2
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    assert compare_images(flat, flat + 20).ssim[0] == pytest.approx((2 * a * b + c) / (a**2 + b**2 + c), rel=1e-6)


def test_identical_images_are_counted_apart():
    images = random_images(4)
    baselines = images.copy()
    baselines[2] += 5
    found = compare_images(images, baselines)
    assert np.isinf(found.psnr).tolist() == [True, True, False, True] and found.ssim[0] == 1.0
    summary = found.summary()
    assert summary["identical"] == 3 and summary["psnr"] == pytest.approx(34.15, abs=0.01)
    assert "3 of 4 images are identical" in fidelity_text(summary)
    same = compare_images(images, images).summary()
    assert same["psnr"] is None and same["ssim"] == 1.0 and "PSNR  -" in fidelity_text(same)
    json.dumps(summary, allow_nan=False)


def test_the_worst_are_the_lowest_twentieth():
    values = np.arange(100.0)
    summary = Fidelity(values, values / 100).summary()
    assert summary["psnr_worst"] == 2.0 and summary["ssim_worst"] == pytest.approx(0.02)
    assert Fidelity(values[:3], values[:3]).summary()["psnr_worst"] == 0.0  # one at least


def test_folders_and_npz_files_are_compared_number_by_number(tmp_path):
    images = random_images(70)  # more than one batch
    write_set(tmp_path / "cached", images, global_seed=0, labels="random")
    write_npz(tmp_path / "full.npz", images + 5, np.zeros(70))
    found = compare_sets(tmp_path / "cached", tmp_path / "full.npz")
    assert len(found.psnr) == 70 and found.psnr == pytest.approx(34.15, abs=0.01)


def test_sets_of_other_number_or_size_are_no_baseline():
    with pytest.raises(UserError, match="baseline must .* 3 of 16 x 16, got 4 of 16 x 16"):
        compare_images(random_images(3), random_images(4))
    with pytest.raises(UserError, match="baseline must .* 3 of 16 x 16, got 3 of 8 x 8"):
        compare_images(random_images(3), random_images(3, 8))
    with pytest.raises(UserError, match="at least 7 x 7 pixels for SSIM, got 6 x 6"):
        compare_images(random_images(3, 6), random_images(3, 6))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_seed": 1}, "--baseline must be sampled with global_seed 0, .* got 1"),
        ({"labels": "3"}, "--baseline must be sampled with labels random, .* got 3"),
        ({"checkpoint": "2.pt"}, "--baseline must be sampled with checkpoint 1.pt, .* got 2.pt"),
    ],
)
def test_folders_of_other_noise_labels_or_weights_are_no_baseline(tmp_path, changed, message):
    settings = {"global_seed": 0, "labels": "random", "checkpoint": "1.pt"}
    write_set(tmp_path / "a", random_images(2), **settings)
    write_set(tmp_path / "b", random_images(2), **{**settings, **changed})
    with pytest.raises(UserError, match=message):
        compare_sets(tmp_path / "a", tmp_path / "b")


def test_other_numbers_or_labels_are_no_baseline(tmp_path):
    for name in ("a", "b"):
        write_set(tmp_path / name, random_images(3), global_seed=0, labels="random")
    (tmp_path / "b" / "000001.png").rename(tmp_path / "b" / "000007.png")
    with pytest.raises(UserError, match="--baseline must hold the same images .* 2 are in one of them only, such as 1"):
        compare_sets(tmp_path / "a", tmp_path / "b")
    write_npz(tmp_path / "a.npz", random_images(2), np.array([1, 2]))
    write_npz(tmp_path / "b.npz", random_images(2), np.array([1, 3]))
    with pytest.raises(UserError, match="--baseline must hold images of the same labels"):
        compare_sets(tmp_path / "a.npz", tmp_path / "b.npz")


def test_states_agree_until_the_first_forecast_and_differ_after_it(tmp_path):
    student = load_checkpoint(write_run(tmp_path))
    full = Sampler(student, SamplingConfig(num_steps=8))
    cached = Sampler(student, SamplingConfig(num_steps=8, cache="taylor", interval=3, order=1))
    errors = step_errors(cached, full, range(70))  # more than one batch
    assert errors.shape == (8, 70) and errors.dtype == np.float64
    skipped = [step for step in range(8) if step not in cached.cache.full_steps]
    assert errors[: skipped[0]].max() < 1e-6 and errors[skipped[0] :].min() > 1e-5  # rounding, and forecasts
    record = summarise_steps(errors)
    assert record[-1]["step"] == 7 and record[-1]["mean"] == errors[-1].mean() <= record[-1]["largest"]
    assert f"{errors[-1].mean():.2e} after step 8" in steps_text(errors)
    assert (step_errors(full, full, range(2)) == 0).all()
