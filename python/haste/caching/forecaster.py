"""How a skipped step is predicted: as a weighted sum of snapshots of full steps, with weights made on the host.

Every forecaster here is linear in the last order + 1 full features, so one kernel serves all of them. Taylor and
Hermite share TaylorSeer's finite differences and count in the sampler's steps; Newton interpolates over true times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import factorial, prod
from typing import ClassVar, Literal, Protocol

from haste.errors import UserError


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
