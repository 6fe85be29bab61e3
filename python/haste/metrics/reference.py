"""The reference of an evaluation, as --reference names it: features of real images, or their mean and covariance.

    a folder, a zip     image files of one size
    .npz                arr_0 (N, H, W, 3) uint8, images; or mu (D,) and sigma (D, D), the mean and covariance of
                        features; or both: ADM's two layouts. mu_s and sigma_s, of spatial features, are for sFID.
    .npz, .npy          a file of --save-reference, or features (N, D) with --features stored
    digits              scikit-learn's handwritten digits

Stored features and statistics are valid for one network only.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from haste.data.archive import list_npz, read_npy, read_npz, write_arrays
from haste.data.images import ImageArray, ImageSet, open_images, to_uint8
from haste.errors import BadFile, UserError
from haste.io import writing
from haste.metrics.config import STORED
from haste.metrics.features import Extractor, Features, concatenate, extract
from haste.metrics.formulas import Gaussian, fault_of_moments, fit_gaussian
from haste.registry import DATASETS, REFERENCES, plugin

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """The real images that samples are compared with, in the features of one network.

    Attributes:
        name: for messages and records.
        extractor: the network's key; "stored" for features from a file.
        features: (N, D); None if only statistics were stored.
        stored: mean and covariance, if they were stored.
        spatial: mean and covariance of spatial features, for sFID.
        no_spatial: why there are none, to end a sentence.
        lossy: whether some images were compressed with loss, as JPEG; None if that is not known.
    """

    name: str
    extractor: str
    features: np.ndarray | None
    stored: Gaussian | None = None
    spatial: Gaussian | None = None
    no_spatial: str = "the reference has no mu_s and sigma_s, the statistics of spatial features"
    lossy: bool | None = None

    def require_features(self) -> np.ndarray:
        """The features (N, D). Raises UserError if only statistics were stored."""
        if self.features is None:
            raise UserError("of the reference only mean and covariance are stored, which allow the FD alone")
        return self.features

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance. Raises UserError if they were not stored and the images are too few."""
        return self.stored or fit_gaussian(self.require_features(), "real images")

    @property
    def dimension(self) -> int:
        return self.gaussian.dimension if self.features is None else self.features.shape[1]

    @property
    def count(self) -> int | None:
        """The number of images; None if statistics were stored without it."""
        return len(self.features) if self.features is not None else self.gaussian.count


def load_reference(source: str, extractor: Extractor, batch_size: int = 64) -> Reference:
    """Load a reference by name, in the features of `extractor`, under a progress bar. Raises UserError."""

    def from_images(images: ImageSet) -> Reference:
        features = extract(extractor, images, batch_size, title="reference")
        reference = Reference(source, extractor.key, features.values, lossy=images.lossy)
        if features.spatial is None:
            return reference
        try:
            return replace(reference, spatial=fit_gaussian(features.spatial, "real images"))
        except UserError as error:  # too few images
            return replace(reference, no_spatial=str(error))

    source = REFERENCES.get(source, source)
    if source in DATASETS:
        return from_images(ImageArray(to_uint8(plugin(DATASETS, source)()[0])))  # rounded as samples are
    path = Path(source).expanduser()
    if not path.exists():
        known = ", ".join(name for name in DATASETS if name not in REFERENCES)
        raise UserError(
            f"--reference must be a folder of images, an .npz of images or statistics, or {known}, got {source}, which "
            "does not exist"
        )
    arrays = _list_arrays(path) if path.suffix == ".npz" else []
    if "mu" in arrays or "features" in arrays:
        reference = _read_statistics(path, extractor.key)
        if reference.dimension == extractor.dimension:
            if reference.features is not None or "arr_0" not in arrays:
                return reference
            images = from_images(open_images(path, "--reference"))
            return replace(images, stored=reference.stored, spatial=reference.spatial)
        mismatch = (
            f"--reference must have {extractor.dimension} dimensions, as {extractor.describe()}, got "
            f"{reference.dimension} in the statistics of {source}"
        )
        if "arr_0" not in arrays:
            raise UserError(f"{mismatch}; they are of another network")
        logger.info("%s, so its images are used alone", mismatch)
    return from_images(open_images(path, "--reference"))


def stored_reference(source: str) -> Reference:
    """Load features or statistics from a file or a folder, of any network."""
    path = Path(source).expanduser()
    if path.suffix == ".npz" and path.is_file() and "mu" in _list_arrays(path):
        return _read_statistics(path, None)
    return Reference(source, STORED, stored_features(path, "--reference").values)


def stored_features(path: Path, flag: str) -> Features:
    """Read features (N, D) from an .npy or .npz file, or from all such files in a folder, sorted by name.

    Arrays of an .npz: features or arr_0, and optionally probabilities (N, classes).
    """
    if not path.exists():
        raise UserError(f"{flag} must be a file or folder of features, got {path}, which does not exist")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz"))
    if not files:
        raise UserError(f"{flag} must hold .npy or .npz files of features, got {path}, which has none")
    parts = [_read_features(file, flag) for file in files]
    widths = sorted({part.dimension for part in parts})
    if len(widths) > 1:
        raise UserError(f"{flag} must hold features of one dimension, got {widths[0]} and {widths[-1]} in {path}")
    return concatenate(parts)


def _read_features(path: Path, flag: str) -> Features:
    try:
        if path.suffix == ".npz":
            names = set(list_npz(path)) & {"features", "probabilities", "arr_0"}
            arrays = read_npz(path, names - {"arr_0"} if "features" in names else names)
        else:
            arrays = {"features": read_npy(path)}
    except BadFile as fault:
        raise UserError(f"{flag} must hold features, got {path}, which {fault.reason}") from fault
    values, probabilities = arrays.get("features", arrays.get("arr_0")), arrays.get("probabilities")
    if values is None:
        raise UserError(f"{flag} must hold an array features or arr_0, got {path} without one")
    _check_array(values, "features", "images, D", path, flag)
    if probabilities is not None:
        _check_array(probabilities, "probabilities", "images, classes", path, flag)
        if len(probabilities) != len(values):
            raise UserError(f"{flag} must hold as many probabilities as features, got {path} with {len(probabilities)} "
                            f"and {len(values)}")  # fmt: skip
    return Features(values, probabilities)


def _check_array(array: np.ndarray, name: str, form: str, path: Path, flag: str, kinds: str = "f") -> None:
    """UserError unless an array holds finite numbers of the kinds, in as many dimensions as `form` names."""
    if array.dtype.kind not in kinds or array.ndim != form.count(",") + 1 or not array.size:
        raise UserError(f"{flag} must hold {name} as numbers ({form}), got {array.dtype} {array.shape} in {path}")
    if not np.isfinite(array).all():
        raise UserError(f"{flag} must hold finite {name}, got NaN or infinity in {path}")


def _read_statistics(path: Path, key: str | None) -> Reference:
    """Read mu and sigma of an .npz, mu_s, sigma_s and features if it has them, of the network `key` or, for None, of
    any."""
    try:
        arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s", "features", "extractor", "lossy"))
    except BadFile as fault:
        raise UserError(f"--reference must hold statistics, got {path}, which {fault.reason}") from fault
    forms = {"mu": "D", "sigma": "D, D", "mu_s": "D", "sigma_s": "D, D", "features": "images, D"}
    for name, form in forms.items():
        if name in arrays:
            _check_array(arrays[name], name, form, path, "--reference", "iuf")
    network = str(arrays["extractor"]) if "extractor" in arrays else key
    if key is not None and network != key:
        raise UserError(f"--reference must be of the network of --features, {key}, got {path} of {network}")
    features = arrays.get("features")
    count = None if features is None else len(features)
    stored = _read_gaussian(path, arrays, "mu", "sigma", count)
    if stored is not None and features is not None and features.shape[1] != stored.dimension:
        raise UserError(
            f"--reference must hold mu and features of one network, got {stored.dimension} and {features.shape[1]} "
            f"dimensions in {path}"
        )
    spatial = _read_gaussian(path, arrays, "mu_s", "sigma_s", count)
    lossy = bool(arrays["lossy"]) if "lossy" in arrays else None
    return Reference(str(path), key or STORED, features, stored, spatial, lossy=lossy)


def _read_gaussian(
    path: Path, arrays: dict[str, np.ndarray], mu: str, sigma: str, count: int | None
) -> Gaussian | None:
    """A mean and a covariance under these names; None if there is no mean."""
    if mu not in arrays:
        return None
    mean, covariance = arrays[mu].astype(np.float64), arrays.get(sigma, np.empty(0)).astype(np.float64)
    if fault := fault_of_moments(mean, covariance, mu, sigma):
        raise UserError(f"--reference must hold a mean and a covariance, got {path}, whose {fault}")
    return Gaussian(mean, covariance, count)


def save_reference(path: Path, reference: Reference) -> None:
    """Write features, the network's key and, of enough images, statistics, for --reference. Raises UserError.

    Beside the arrays of ADM's files there are `extractor`, `source` and, if it is known, `lossy`.
    """
    check_replaceable(path, reference)
    arrays = {"extractor": np.array(reference.extractor), "source": np.array(reference.name)}
    try:
        arrays |= {"mu": reference.gaussian.mean, "sigma": reference.gaussian.covariance}
    except UserError:
        logger.info("%s has too few images for mu and sigma; %s holds its features alone", reference.name, path)
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if reference.features is not None:
        arrays["features"] = reference.features
    if reference.lossy is not None:
        arrays["lossy"] = np.array(reference.lossy)
    with writing(f"--save-reference {path}"):
        write_arrays(path, arrays)


def check_replaceable(path: Path, reference: Reference | None = None) -> None:
    """UserError if --save-reference names an existing file that is no saved reference, or not the given one."""
    if not os.path.lexists(path):
        return
    try:
        arrays = read_npz(path, ("extractor", "source"))
        saved = (str(arrays["extractor"]), str(arrays["source"]))
    except (BadFile, KeyError) as fault:
        raise UserError(f"--save-reference must be a new file, got {path}, which holds something else") from fault
    if reference is not None and saved != (reference.extractor, reference.name):
        raise UserError(
            f"--save-reference must be a new file, or one of {reference.name} in the features of "
            f"{reference.extractor}, got {path}, which holds {saved[1]} in the features of {saved[0]}"
        )


def _list_arrays(path: Path) -> list[str]:
    try:
        return list_npz(path)
    except BadFile as fault:
        raise UserError(f"--reference must be an .npz, got {path}, which {fault.reason}") from fault
