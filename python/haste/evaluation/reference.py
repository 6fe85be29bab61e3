"""The reference of an evaluation: features of real images, or their mean and covariance, by what --reference names.

    a folder, a zip     image files of one size
    .npz                arr_0 (N, H, W, 3) uint8, images; or mu (D,) and sigma (D, D), the mean and covariance of
                        features; or both: ADM's two layouts. ADM's mu_s and sigma_s, of another layer, are not used.
    .npz, .npy          what --save-reference wrote, or features (N, D) with --features stored
    digits              scikit-learn's handwritten digits

Stored features and statistics belong to the network that they came from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from haste.data.archive import list_npz, read_npy, read_npz
from haste.data.images import ImageArray, ImageSet, open_images, to_uint8, write_arrays
from haste.errors import BadFile, UserError
from haste.evaluation.config import STORED
from haste.evaluation.features import Extractor, Features, concatenate, extract
from haste.evaluation.metrics import Gaussian, fault_of_moments, fit_gaussian
from haste.io import writing
from haste.registry import DATASETS, plugin

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # of the images of a batch, and of all


@dataclass(frozen=True)
class Reference:
    """What samples are compared with, in the features of one network.

    name: for messages and records.
    extractor: the network's key; "stored" for features that came from a file.
    features: (N, D); None where only statistics were stored.
    stored: mean and covariance, where they were stored.
    of_jpeg: whether it was made from JPEG files, as far as is known.
    """

    name: str
    extractor: str
    features: np.ndarray | None
    stored: Gaussian | None = None
    of_jpeg: bool = False

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance. Raises UserError if they were not stored and the images are too few."""
        return self.stored if self.stored is not None else fit_gaussian(self.features, "real images")

    @property
    def dimension(self) -> int:
        return self.gaussian.dimension if self.features is None else self.features.shape[1]

    @property
    def count(self) -> int | None:
        """Images; None where only statistics were stored, without their number."""
        return len(self.features) if self.features is not None else self.gaussian.count


def load_reference(
    source: str, extractor: Extractor, batch_size: int = 64, progress: Progress = lambda done, of: None
) -> Reference:
    """The reference of a name, in the features of `extractor`.

    Raises UserError for what does not exist, holds no reference, or belongs to another network.
    """

    def from_images(images: ImageSet) -> Reference:
        features = extract(extractor, images, batch_size, lambda done: progress(done, len(images)))
        return Reference(source, extractor.key, features.values, of_jpeg=images.are_jpeg)

    if source in DATASETS:
        return from_images(ImageArray(to_uint8(plugin(DATASETS, source)()[0])))  # rounded as samples are
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"--reference must be a folder of images, an .npz of images or statistics, or {', '.join(DATASETS)}, got "
            f"{source}, which does not exist"
        )
    arrays = _list_arrays(path) if path.suffix == ".npz" else []
    if "mu" in arrays or "features" in arrays:
        reference = _read_statistics(path, extractor.key)
        if reference.dimension == extractor.dimension:
            if reference.features is not None or "arr_0" not in arrays:
                return reference
            images = from_images(open_images(path, "--reference"))
            return Reference(source, extractor.key, images.features, reference.stored)
        mismatch = (
            f"--reference is {source}, whose statistics have {reference.dimension} dimensions; "
            f"{extractor.describe()} gives {extractor.dimension}"
        )
        if "arr_0" not in arrays:
            raise UserError(f"{mismatch}; both sides need the same network")
        logger.info("%s, so its images are used alone", mismatch)
    return from_images(open_images(path, "--reference"))


def stored_reference(source: str) -> Reference:
    """Features or statistics from a file or a folder, whatever network they come from."""
    path = Path(source).expanduser()
    if path.suffix == ".npz" and path.is_file() and "mu" in _list_arrays(path):
        return _read_statistics(path, None)
    return Reference(source, STORED, stored_features(path, "--reference").values)


def stored_features(path: Path, flag: str) -> Features:
    """Features (N, D) of an .npy or .npz file, or of all such files in a folder, in the order of their names.

    In an .npz they lie under features or arr_0, and class probabilities (N, classes), if any, under probabilities.
    """
    if not path.exists():
        raise UserError(f"{flag} is {path}, which does not exist")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz"))
    if not files:
        raise UserError(f"{flag} is {path}, which holds no .npy or .npz files of features")
    parts = [_read_features(file, flag) for file in files]
    widths = {part.dimension for part in parts}
    if len(widths) > 1:
        listed = " and ".join(map(str, sorted(widths)))
        raise UserError(f"{flag} is {path}, whose files hold features of {listed} dimensions; they must be alike")
    if not all(part.probabilities is not None for part in parts):
        parts = [Features(part.values) for part in parts]
    return concatenate(parts)


def _read_features(path: Path, flag: str) -> Features:
    try:
        if path.suffix == ".npz":
            arrays = read_npz(path, ("features", "probabilities"))
            arrays = arrays if "features" in arrays else {**arrays, **read_npz(path, ("arr_0",))}
            values, probabilities = arrays.get("features", arrays.get("arr_0")), arrays.get("probabilities")
        else:
            values, probabilities = read_npy(path), None
    except BadFile as fault:
        raise UserError(f"{flag}: {path} holds no features: it {fault.reason}") from fault
    if values is None:
        raise UserError(f"{flag}: {path} holds no features; it must have an array features or arr_0")
    if values.ndim != 2 or not values.size or not np.issubdtype(values.dtype, np.floating):
        raise UserError(
            f"{flag}: {path} holds {values.dtype} {values.shape}; features must be floats (images, dimension)"
        )
    if not np.isfinite(values).all():
        raise UserError(f"{flag}: {path} holds features that are not finite")
    if probabilities is not None and not (
        np.issubdtype(probabilities.dtype, np.floating)
        and probabilities.ndim == 2
        and len(probabilities) == len(values)
        and np.isfinite(probabilities).all()
    ):
        raise UserError(
            f"{flag}: {path} holds probabilities {probabilities.dtype} {probabilities.shape}; "
            f"they must be finite floats ({len(values)}, classes)"
        )
    return Features(values, probabilities)


def _read_statistics(path: Path, key: str | None) -> Reference:
    """mu and sigma of an .npz, and features if it has them. key: the network that is asked for, None if any will do."""
    try:
        arrays = read_npz(path, ("mu", "sigma", "features", "extractor"))
    except BadFile as fault:
        raise UserError(f"--reference is {path}, which {fault.reason}") from fault
    for name, form in (("mu", ("D",)), ("sigma", ("D", "D")), ("features", ("images", "D"))):
        array = arrays.get(name)
        if array is not None and (array.dtype.kind not in "iuf" or array.ndim != len(form) or not array.size):
            wanted = f"numbers ({', '.join(form)})"
            raise UserError(f"--reference is {path}, whose {name} is {array.dtype} {array.shape}; it must be {wanted}")
    network = str(arrays["extractor"]) if "extractor" in arrays else None
    if None not in (network, key) and network != key:
        raise UserError(f"--reference is {path}, which was saved with {network}; --features gives {key}")
    features = arrays.get("features")
    if features is not None and not np.isfinite(features).all():
        raise UserError(f"--reference is {path}, whose features are not finite")
    stored = None
    if "mu" in arrays:
        mean = arrays["mu"].astype(np.float64)
        covariance = arrays.get("sigma", np.empty(0)).astype(np.float64)
        if wrong := fault_of_moments(mean, covariance):
            raise UserError(f"--reference is {path}, whose {wrong}")
        if features is not None and features.shape[1] != len(mean):
            raise UserError(
                f"--reference is {path}, whose mu has {len(mean)} dimensions and features {features.shape[1]}; "
                "they must be those of the same network"
            )
        stored = Gaussian(mean, covariance, None if features is None else len(features))
    return Reference(str(path), key or STORED, features, stored)


def save_reference(path: Path, reference: Reference) -> None:
    """Keep statistics, features and the network's key for the next time; without statistics if images are too few.

    Raises UserError if the file holds anything but the same reference in the same network, or cannot be written.
    """
    check_replaceable(path, reference)
    arrays = {"extractor": np.array(reference.extractor), "source": np.array(reference.name)}
    try:
        arrays |= {"mu": reference.gaussian.mean, "sigma": reference.gaussian.covariance}
    except UserError:
        logger.info("%s has too few images for mu and sigma; %s holds its features alone", reference.name, path)
    if reference.features is not None:
        arrays["features"] = reference.features
    with writing(f"--save-reference {path}"):
        write_arrays(path, arrays)


def check_replaceable(path: Path, reference: Reference | None = None) -> None:
    """UserError if --save-reference names a file that must not be replaced: none of its own, or, where the reference is
    known, one of another reference or network."""
    if not os.path.lexists(path):
        return
    try:
        names = read_npz(path, ("extractor", "source"))
        saved = (str(names["extractor"]), str(names["source"]))
    except (BadFile, KeyError) as fault:
        raise UserError(f"--save-reference is {path}, which holds something else; it must be a new file") from fault
    if reference is not None and saved != (reference.extractor, reference.name):
        raise UserError(
            f"--save-reference is {path}, which holds {saved[1]} in the features of {saved[0]}, not {reference.name} "
            f"in those of {reference.extractor}; it must be a new file, or one of the same"
        )


def _list_arrays(path: Path) -> list[str]:
    try:
        return list_npz(path)
    except BadFile as fault:
        raise UserError(f"--reference is {path}, which {fault.reason}") from fault
