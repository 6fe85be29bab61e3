"""The settings of the metrics, and the names of features and references. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from haste.errors import UserError
from haste.registry import DATASETS, EXTRACTORS
from haste.validation import check_types

STORED = "stored"  # the name of features that are read from a file


@dataclass(frozen=True)
class MetricConfig:
    """Settings of the metrics: the subsets of KID, and the seed of all random subsets."""

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)


def choose_features(features: str | None, reference: str | None, prefix: str = "") -> tuple[str, str]:
    """The names of the features and the reference, by default the features' own data.

    Args:
        prefix: of the flags that are named, such as "evaluation-".

    Raises:
        UserError: one is missing.
    """
    if features is None:
        raise UserError(
            f"--{prefix}features must be given: inception:PATH, or a teacher's name or folder such as dinov2-vit-l "
            f"(there is a default for {', '.join(EXTRACTORS)} alone)"
        )
    reference = reference or (features if features in DATASETS else None)
    if reference is None:
        raise UserError(
            f"--{prefix}reference must be given with --{prefix}features {features}: a folder of real images, or an "
            ".npz of images or statistics"
        )
    return features, reference
