"""What skipped evaluations add to their tokens, made for all of them up to the next full one when the first one asks.

It depends on the snapshots, the weights and the evaluation's time, and not on the image. One pass over the snapshots
serves several evaluations then, and kept is one (B, N, D) for each: beside the snapshots of all modules, little.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from haste.caching.snapshots import Place
from haste.sampling.guidance import Branches

MOST_AHEAD = 8  # evaluations: what one pass makes on a GPU; it bounds the memory too


class Correction(NamedTuple):
    """Of one evaluation: what it adds to its tokens (B, N, D), and its conditioning (B, D)."""

    added: Tensor
    c: Tensor


class Corrections:
    """Those of the evaluations to come, by the guidance branches in their rows and their place in the run.

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
        self._held: dict[Branches, dict[Place, Correction]] = {}

    def get(self, branches: Branches, place: Place) -> Correction | None:
        return self._held.get(branches, {}).get(place)

    def keep(self, branches: Branches, places: list[Place], added: Tensor, c: Tensor) -> None:
        """added (S, B, N, D), c (S, B, D), in the order of the places; what these branches had is forgotten."""
        self._held[branches] = {p: Correction(*each) for p, *each in zip(places, added, c, strict=True)}
        held = (tensor for of in self._held.values() for correction in of.values() for tensor in correction)
        self.most_bytes = max(self.most_bytes, sum(tensor.nbytes for tensor in held))
