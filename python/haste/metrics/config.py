"""The settings of the metrics."""

from __future__ import annotations

from dataclasses import dataclass

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
