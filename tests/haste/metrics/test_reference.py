from __future__ import annotations

import logging

import numpy as np
import pytest
from haste.data.images import write_image
from haste.errors import UserError
from haste.metrics.formulas import Gaussian, frechet_distance
from haste.metrics.reference import (
    check_replaceable,
    load_reference,
    save_reference,
    stored_features,
    stored_reference,
)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def statistics() -> dict[str, np.ndarray]:
    values = np.random.default_rng(1).standard_normal((50, 3))
    return {"mu": values.mean(axis=0).astype(np.float32), "sigma": np.cov(values.T)}


def test_images_of_a_folder_and_of_adms_arrays(tmp_path, network, images):
    for index, image in enumerate(images):
        write_image(tmp_path / "real" / f"{index}.png", image)
    np.savez(tmp_path / "adm.npz", arr_0=images)
    folder = load_reference(str(tmp_path / "real"), network, 5)
    array = load_reference(str(tmp_path / "adm.npz"), network)
    assert sorted(map(tuple, folder.features)) == sorted(map(tuple, array.features))
    assert (array.features == network(images).values).all() and array.count == 12
    assert array.gaussian.covariance == pytest.approx(np.cov(array.features.T))


def test_the_digits_are_a_reference_of_any_network(network):
    assert load_reference("digits", network).count == 1797


def test_adms_statistics_alone(tmp_path, network, statistics):
    np.savez(tmp_path / "adm.npz", **statistics, mu_s=np.zeros(7), sigma_s=np.eye(7))
    found = load_reference(str(tmp_path / "adm.npz"), network)
    assert found.features is None and found.count is None and network.seen == 0
    assert found.gaussian.mean.dtype == np.float64
    assert found.gaussian.mean == pytest.approx(statistics["mu"]) and found.gaussian.covariance.shape == (3, 3)


def test_adms_statistics_beside_images_are_both_used(tmp_path, network, images, statistics):
    np.savez(tmp_path / "adm.npz", arr_0=images, **statistics)
    found = load_reference(str(tmp_path / "adm.npz"), network)
    assert found.gaussian.mean == pytest.approx(statistics["mu"])
    assert (found.features == network(images).values).all() and found.count == 12


def test_statistics_of_another_network_are_passed_over_where_there_are_images(tmp_path, network, images, caplog):
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(5), sigma=np.eye(5))
    with caplog.at_level(logging.INFO):
        found = load_reference(str(tmp_path / "adm.npz"), network)
    assert "--reference must have 3 dimensions" in caplog.text and "so its images are used alone" in caplog.text
    assert found.stored is None and found.gaussian.dimension == 3
    np.savez(tmp_path / "adm.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match="--reference must have 3 dimensions, as mean colours, got 5"):
        load_reference(str(tmp_path / "adm.npz"), network)


def test_a_saved_reference_needs_no_images_the_next_time(tmp_path, network, images):
    np.savez(tmp_path / "adm.npz", arr_0=images)
    first = load_reference(str(tmp_path / "adm.npz"), network)
    save_reference(tmp_path / "saved.npz", first)
    network.seen = 0
    second = load_reference(str(tmp_path / "saved.npz"), network)
    assert network.seen == 0 and second.count == 12
    assert (second.features == first.features).all() and (second.gaussian.covariance == first.gaussian.covariance).all()
    network.key = "others"
    with pytest.raises(
        UserError, match="--reference must be of the network of --features, others, got .* of mean-colours"
    ):
        load_reference(str(tmp_path / "saved.npz"), network)


@pytest.mark.parametrize("kind", ["text", "arrays", "folder", "link"])
def test_a_saved_reference_replaces_no_file_of_another_kind(tmp_path, network, images, kind):
    np.savez(tmp_path / "adm.npz", arr_0=images)
    path = tmp_path / "saved.npz"
    if kind == "text":
        path.write_text("mine")
    elif kind == "arrays":
        np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nothing")
    before = path.read_bytes() if path.is_file() else None
    for reference in (None, load_reference(str(tmp_path / "adm.npz"), network)):
        with pytest.raises(UserError, match="--save-reference must be a new file, got .*, which holds something else"):
            check_replaceable(path, reference)
    assert before is None or path.read_bytes() == before


def test_a_saved_reference_replaces_the_same_alone(tmp_path, network, images):
    for name, shown in (("adm.npz", images), ("others.npz", images[:11])):
        np.savez(tmp_path / name, arr_0=shown)
    first, other = (load_reference(str(tmp_path / name), network) for name in ("adm.npz", "others.npz"))
    path = tmp_path / "saved.npz"
    for _ in range(2):
        save_reference(path, first)
    with pytest.raises(
        UserError, match="--save-reference must be .* one of .*others.npz .*, got .*saved.npz, which holds .*adm.npz"
    ):
        save_reference(path, other)
    assert load_reference(str(path), network).count == 12


def test_a_small_reference_is_saved_without_statistics(tmp_path, network, images):
    np.savez(tmp_path / "adm.npz", arr_0=images[:3])
    save_reference(tmp_path / "saved.npz", load_reference(str(tmp_path / "adm.npz"), network))
    again = load_reference(str(tmp_path / "saved.npz"), network)
    assert again.count == 3
    with pytest.raises(UserError, match="3 real images are too few"):
        _ = again.gaussian


def test_stored_features_come_from_files_and_folders(tmp_path):
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((4, 3)).astype(np.float32), rng.standard_normal((5, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", a)
    np.savez(tmp_path / "b.npz", features=b, probabilities=np.full((5, 2), 0.5))
    assert (stored_features(tmp_path, "--samples").values == np.concatenate([a, b])).all()
    assert stored_features(tmp_path / "b.npz", "--samples").probabilities.shape == (5, 2)
    assert stored_reference(str(tmp_path / "a.npy")).count == 4
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert stored_reference(str(tmp_path / "s.npz")).features is None


def test_references_that_are_none_are_refused(tmp_path, network):
    def refused(message, **arrays):
        path = tmp_path / "x.npz"
        if arrays:
            np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            load_reference(str(path), network)

    refused("--reference must be a folder of images, an .npz of images or statistics, or digits, got .*x.npz")
    refused(r"mu and sigma must be \(D,\) and \(D, D\), got \(3,\) and \(2, 2\)", mu=np.zeros(3), sigma=np.eye(2))
    refused("--reference must hold finite mu, got .*x.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    refused("--reference must hold finite sigma, got .*x.npz", mu=np.zeros(3), sigma=np.diag([1, np.inf, 1]))
    refused(r"sigma is not symmetric, 0.5 at \(0, 1\) and 0 at", mu=np.zeros(2), sigma=np.array([[1, 0.5], [0, 1]]))
    refused("sigma has the negative variance -2 at 1", mu=np.zeros(2), sigma=np.diag([1, -2]))
    refused("sigma has the negative eigenvalue -1 beside 3", mu=np.zeros(2), sigma=np.array([[1, 2], [2, 1]]))
    refused("sigma is all zeros, as for a single image", mu=np.zeros(2), sigma=np.zeros((2, 2)))
    refused("mu and sigma must be", mu=np.zeros(2))
    moments = {"mu": np.zeros(3), "sigma": np.eye(3)}
    refused("--reference must hold finite features", features=np.full((20, 3), np.nan), **moments)
    refused("--reference must hold mu and features of one network, got 3 and 2", features=np.ones((20, 2)), **moments)
    refused("must be an .npz with images under arr_0", other=np.zeros(3))
    (tmp_path / "x.npz").write_text("text")
    refused("x.npz, which cannot be read as an .npz file")


def test_statistics_of_pytorch_fid_are_read_and_belong_to_its_features(tmp_path, network, images):
    """U-ViT's fid_stats_mscoco256_val.npz holds mu and sigma in double precision, and nothing else."""
    values = np.random.default_rng(4).standard_normal((40, network.dimension))
    path = tmp_path / "fid_stats_mscoco256_val.npz"
    np.savez(path, mu=values.mean(axis=0), sigma=np.cov(values, rowvar=False))
    reference = load_reference(str(path), network)
    assert reference.features is None and reference.count is None
    assert reference.gaussian.mean == pytest.approx(values.mean(axis=0))
    expected = np.sum((reference.gaussian.mean - 1.0) ** 2)
    shifted = Gaussian(np.ones(network.dimension), reference.gaussian.covariance, None)
    assert frechet_distance(shifted, reference.gaussian) == pytest.approx(expected)


def test_a_covariance_rounded_to_single_precision_is_one(tmp_path, network):
    """Of fewer samples than dimensions, so that eigenvalues of 0 come out on either side of it."""
    values = np.random.default_rng(3).standard_normal((20, 64)) @ np.diag(np.logspace(0, 2, 64))
    sigma = np.cov(values.T).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < -1e-6
    np.savez(tmp_path / "x.npz", mu=values.mean(axis=0), sigma=sigma)
    rounded = stored_reference(str(tmp_path / "x.npz")).gaussian
    exact = Gaussian(values.mean(axis=0), np.cov(values.T), None)
    assert frechet_distance(rounded, rounded) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(rounded, exact) == pytest.approx(0, abs=1e-2) and np.trace(sigma) > 1e4


def test_stored_features_that_are_none_are_refused(tmp_path):
    def refused(message, array):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(UserError, match=message):
            stored_features(tmp_path / "x.npy", "--samples")

    refused(r"--samples must hold features as numbers \(images, D\), got float64 \(3,\)", np.zeros(3))
    refused("--samples must hold features", np.zeros((3, 2), dtype=np.int64))
    refused("--samples must hold finite features", np.full((3, 2), np.inf))
    refused("--samples must hold features", np.zeros((3, 0)))
    (tmp_path / "x.npy").write_text("text")
    with pytest.raises(UserError, match="--samples must hold features, got .*x.npy"):
        stored_features(tmp_path / "x.npy", "--samples")
    (tmp_path / "x.npy").unlink()
    with pytest.raises(UserError, match="--samples must hold .npy or .npz files"):
        stored_features(tmp_path, "--samples")
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    np.save(tmp_path / "b.npy", np.zeros((2, 3)))
    with pytest.raises(UserError, match="--samples must hold features of one dimension, got 2 and 3"):
        stored_features(tmp_path, "--samples")
