"""The features of the last full evaluations, kept raw.

How a skipped step is predicted: as a weighted sum of snapshots of full steps, with weights made on the host.

Every forecaster here is linear in the last order + 1 full features, so one kernel serves all of them. Taylor and
Hermite share TaylorSeer's finite differences and count in the sampler's steps; Newton interpolates over true times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import factorial, prod
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from haste.errors import UserError


class Place(NamedTuple):
    """Where in a run an evaluation stands: the index of its time on the sampler's grid, and the time."""

    position: float
    time: float


class SnapshotRing:
    """The last `slots` snapshots of `modules` modules, in one tensor `storage` (modules, slots, rows, N, D).

    One tensor, so that a forecast reads the snapshots of all modules in one launch. The oldest slot is overwritten in
    place; nothing moves, and the weights of a forecast are put in the order of the slots.

    The rows are those of the guidance branches one after the other. A branch that sits out some steps keeps what it
    has, and each branch is forecast from the slots that hold its own rows.
    """

    def __init__(self, modules: int, slots: int) -> None:
        self.modules = modules
        self.slots = slots
        self.release()

    def release(self) -> None:
        """Forgets all snapshots and lets go of their memory."""
        self.storage: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets all snapshots; the memory stays for the next ones."""
        self._places: list[Place] = []  # of the snapshots, newest first
        self._slot_of: list[int] = []  # of the snapshots, newest first
        self._held_by: list[set[str]] = []  # the branches in each, newest first

    def require(self, rows: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the storage fit; snapshots of another shape, type or device are forgotten."""
        shape = (self.modules, self.slots, rows, tokens, dim)
        storage = self.storage
        if storage is None or storage.shape != shape or storage.dtype != dtype or storage.device != device:
            self.release()  # before the new one needs the memory
            with torch.inference_mode(False):  # a later run outside of that mode writes to it too
                self.storage = torch.empty(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        return 0 if self.storage is None else self.storage.nbytes

    def places(self, branch: str) -> list[Place]:
        """Where this branch's snapshots were taken, newest first."""
        return [place for place, held in zip(self._places, self._held_by, strict=True) if branch in held]

    def open(self, place: Place, branches: Sequence[str]) -> int:
        """The slot that these branches' snapshot at `place` goes to.

        One at the newest position, of another branch or of Heun's second evaluation, shares its slot: no difference can
        be divided by a distance of 0.
        """
        if not (self._places and self._places[0].position == place.position):
            if len(self._places) < self.slots:
                slot = len(self._places)
            else:
                self._places.pop()
                self._held_by.pop()
                slot = self._slot_of.pop()
            self._places.insert(0, place)
            self._held_by.insert(0, set())
            self._slot_of.insert(0, slot)
        self._held_by[0] |= set(branches)
        return self._slot_of[0]

    def by_slot(self, weights: Sequence[float], branch: str) -> list[float]:
        """Weights of this branch's snapshots, newest first, in the order of the slots.

        A slot that does not hold this branch gets 0, and a slot of weight 0 is never read.
        """
        slots = [0.0] * self.slots
        own = [slot for slot, held in zip(self._slot_of, self._held_by, strict=True) if branch in held]
        for slot, weight in zip(own, weights, strict=True):
            slots[slot] = weight
        return slots


class Forecaster(Protocol):
    """order: order + 1 snapshots are used. coordinate: what the snapshots are placed by, the number of the sampler's
    step or its time."""

    order: int
    coordinate: ClassVar[Literal["position", "time"]]

    def weights(self, places: Sequence[float], at: float) -> list[float]:
        """The weight of each snapshot in the forecast.

        Args:
            places: where the snapshots were taken, newest first, all different. Fewer than order + 1, as early in a
                run, give a forecast of lower order; more are not looked at and get weight 0.
            at: where to forecast.
        """


@dataclass(frozen=True)
class _OfSomeOrder:
    order: int

    def __post_init__(self) -> None:
        if self.order < 0:
            raise UserError(f"--order must be at least 0, got {self.order}")


@dataclass(frozen=True)
class _OfDifferences(_OfSomeOrder):
    """first: differences begin at this position; what was taken before has no weight, if there is anything else."""

    first: int = 0
    coordinate: ClassVar[Literal["position", "time"]] = "position"

    def _used(self, places: Sequence[float]) -> Sequence[float]:
        """The newest of the places, which differences are formed of."""
        used = [place for place in places[: self.order + 1] if place >= self.first]
        return used or places[:1]


class TaylorForecaster(_OfDifferences):
    """TaylorSeer's forecast as published (arXiv 2503.06923); of order 0 the last full feature again.

    At a full step s, with d the distance to the full step before it,

        T_0 = F(s),   T_{i+1} = (T_i − T_i,old) / d    for i < order,

    and x steps later F̂ = Σ_i T_i · x^i / i!. The published coordinate counts down; the sign cancels in T_i·x^i.

    Every difference is divided by the *last* distance alone, so from order 2 on this is not the interpolating
    polynomial. The published code forms differences from step first_enhance − 1 on; so `first` is first_enhance − 2.
    """

    def weights(self, places: Sequence[float], at: float) -> list[float]:
        return _of_differences(self._used(places), len(places), at, lambda x, i: x**i)


@dataclass(frozen=True)
class HermiteForecaster(_OfDifferences):
    """HiCache's forecast (arXiv 2508.16984): TaylorSeer's with scaled Hermite polynomials in place of powers.

        F̂ = Σ_i T_i · σ^i H_i(σ·x) / i!,   H_{i+1}(x) = 2x·H_i(x) − 2i·H_{i−1}(x)

    The contraction σ damps the high orders, which powers let grow. H_i is even or odd as x^i is, so signs cancel as
    there.
    """

    contraction: float = 0.5

    def weights(self, places: Sequence[float], at: float) -> list[float]:
        return _of_differences(self._used(places), len(places), at, self._polynomial)

    def _polynomial(self, x: float, i: int) -> float:
        scaled, older, value = self.contraction * x, 0.0, 1.0
        for n in range(i):
            older, value = value, 2 * scaled * value - 2 * n * older
        return self.contraction**i * value


class NewtonForecaster(_OfSomeOrder):
    """The polynomial through the last order + 1 snapshots, over the true times.

    Newton's divided differences and Lagrange's weights give the same polynomial; it is exact where the features are one
    of this order, however far apart the full steps are.
    """

    coordinate = "time"

    def weights(self, places: Sequence[float], at: float) -> list[float]:
        used = places[: self.order + 1]
        weights = [
            prod((at - other) / (place - other) for k, other in enumerate(used) if k != j)
            for j, place in enumerate(used)
        ]
        return weights + [0.0] * (len(places) - len(used))


def _of_differences(
    places: Sequence[float], count: int, at: float, polynomial: Callable[[float, int], float]
) -> list[float]:
    """Σ_i T_i · polynomial(x, i) / i! as weights of `count` snapshots, of which those at `places` are the newest.

    T_i are the differences of TaylorForecaster, of as high an order as there are places for.
    """
    distances = [newer - older for newer, older in pairwise(places)]
    # terms[j]: T_i as it stood when snapshot j was the newest, by its coefficients over the snapshots; i grows.
    terms = [[float(j == k) for k in range(count)] for j in range(len(places))]
    weights = [0.0] * count
    for i in range(len(places)):
        factor = polynomial(at - places[0], i) / factorial(i)
        weights = [total + factor * coefficient for total, coefficient in zip(weights, terms[0], strict=True)]
        terms = [
            [(a - b) / d for a, b in zip(term, older, strict=True)]
            for term, older, d in zip(terms[:-1], terms[1:], distances[: len(terms) - 1], strict=True)
        ]
    return weights


FORECASTERS: dict[str, type] = {"taylor": TaylorForecaster, "newton": NewtonForecaster, "hermite": HermiteForecaster}


def make_forecaster(name: str, order: int, first_enhance: int = 1) -> Forecaster:
    """By the name that --cache has; reuse repeats the last full feature, which is Taylor's of order 0.

    first_enhance: of TaylorSeer's schedule, by which the published code tells where differences begin.
    """
    kind = FORECASTERS.get(name, TaylorForecaster)
    return kind(order, max(0, first_enhance - 2)) if issubclass(kind, _OfDifferences) else kind(order)
