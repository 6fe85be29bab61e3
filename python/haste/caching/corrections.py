"""What skipped evaluations add to their tokens, made for all of them up to the next full one when the first one asks.

It depends on the snapshots, the forecast's weights, the labels and the evaluation's time, and not on the image. One
pass over the snapshots serves several evaluations then, and kept is one (B, N, D) for each: beside the snapshots of all
modules, little.

Made ahead are those of evaluations whose time and labels are known: `haste.sampling.sample` tells both. In any other
loop they may be others than the run's plan has, and to compare tensors on a GPU is to wait for it: there, every
evaluation makes its own. The parameters of the model are not looked at; they must not change between two full steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from haste.caching.snapshots import Place
from haste.sampling.guidance import Branches
from haste.sampling.times import version

MOST_AHEAD = 8  # evaluations: what one pass makes on a GPU; it bounds the memory too


class Correction(NamedTuple):
    """Of one evaluation: what it adds to its tokens (B, N, D), and its conditioning (B, D)."""

    added: Tensor
    c: Tensor


@dataclass(frozen=True, eq=False)
class Labels:
    """A tensor of labels as it was at a call. It is known again by what it is, not by its values."""

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, y: Tensor) -> Labels:
        return cls(y, version(y))

    def are(self, other: Labels) -> bool:
        return self.tensor is other.tensor and self.version == other.version


class Corrections:
    """Those of the evaluations to come, by the guidance branches in their rows, their labels and place in the run.

    Attributes:
        most_bytes: the most that was held at once since `start`.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.clear()
        self.most_bytes = 0

    def clear(self) -> None:
        """When a snapshot is taken: what was made without it is no longer wanted."""
        self._held: dict[Branches, tuple[Labels, dict[Place, Correction]]] = {}

    def get(self, branches: Branches, labels: Labels, place: Place) -> Correction | None:
        if branches not in self._held:
            return None
        made_for, corrections = self._held[branches]
        return corrections.get(place) if made_for.are(labels) else None

    def keep(self, branches: Branches, labels: Labels, corrections: dict[Place, Correction]) -> None:
        """What these branches had is forgotten. labels: of the whole call, of which the branches may be one half."""
        self._held[branches] = labels, corrections
        held = (tensor for _, of in self._held.values() for correction in of.values() for tensor in correction)
        self.most_bytes = max(self.most_bytes, sum(tensor.nbytes for tensor in held))
