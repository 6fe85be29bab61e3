"""The features of the last full steps, and how a forecast is made of them: as a weighted sum.

Every forecaster here is linear in the last order + 1 full features, with weights made on the host, so one kernel serves
all of them. Taylor and Hermite share TaylorSeer's finite differences and count in the sampler's steps; Newton
interpolates over true times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import factorial, prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from haste._compat import version
from haste.caching.config import CacheConfig
from haste.samplers import Branches


class Timestep(NamedTuple):
    """The place of a model call in a run: the index of its time on the sampler's grid, and the time."""

    position: float
    time: float


class StoreSpec(NamedTuple):
    """The shape of features of one full call: (modules, rows, tokens, dim), which are kept for several calls."""

    modules: int
    rows: int
    tokens: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.modules * self.rows * self.tokens * self.dim * self.dtype.itemsize


class CachedFeatures:
    """The last `slots` features of `modules` modules, raw, in one tensor `storage` (modules, slots, rows, N, D).

    One tensor, so that a forecast reads the features of all modules in one launch. The oldest slot is overwritten in
    place; nothing moves, and the weights of a forecast are put in the order of the slots.

    The rows are those of the guidance branches one after the other. A branch that sits out some steps keeps what it
    has, and each branch is forecast from the slots that hold its own rows.
    """

    def __init__(self, modules: int, slots: int) -> None:
        self.modules = modules
        self.slots = slots
        self.release()

    def release(self) -> None:
        """Forget all features and free their memory."""
        self.storage = torch.empty(0)
        self.clear()

    def clear(self) -> None:
        """Forget all features; the memory stays for the next ones."""
        self._held: list[tuple[Timestep, int, set[str]]] = []  # newest first: of when, in which slot, which branches

    def reserve(self, rows: int, tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the storage fit; features of another shape, type or device are forgotten."""
        shape = (self.modules, self.slots, rows, tokens, dim)
        storage = self.storage
        if storage.shape != shape or storage.dtype != dtype or storage.device != device:
            self.release()  # before the new one needs the memory
            with torch.inference_mode(False):  # a later run outside of that mode writes to it too
                self.storage = torch.empty(shape, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        return self.storage.nbytes

    def timesteps(self, branch: str) -> list[Timestep]:
        """Those of which this branch's features are held, newest first."""
        return [timestep for timestep, _, branches in self._held if branch in branches]

    def slot_for(self, timestep: Timestep, branches: Sequence[str]) -> int:
        """The slot that these branches' features at `timestep` go to.

        Those at the newest position, of another branch or of Heun's second call, share its slot: no difference can be
        divided by a distance of 0.
        """
        if not (self._held and self._held[0][0].position == timestep.position):
            slot = len(self._held) if len(self._held) < self.slots else self._held.pop()[1]
            self._held.insert(0, (timestep, slot, set()))
        _, slot, held = self._held[0]
        held |= set(branches)
        return slot

    def by_slot(self, weights: Sequence[float], branch: str) -> list[float]:
        """Weights of this branch's features, newest first, in the order of the slots.

        A slot that does not hold this branch gets 0, and a slot of weight 0 is never read.
        """
        slots = [0.0] * self.slots
        own = [slot for _, slot, branches in self._held if branch in branches]
        for slot, weight in zip(own, weights, strict=True):
            slots[slot] = weight
        return slots


Correction = tuple[Tensor, Tensor]
"""Of one call: what it adds to its tokens (B, N, D), and its conditioning (B, D)."""


class Corrections:
    """What forecast calls add to their tokens, computed for all calls up to the next full one at the first of them.

    It depends on the cached features, the forecast's weights, the labels and the call's time, not on the image. So one
    pass over the features serves several calls, and one (B, N, D) is kept for each, which is little beside the features
    of all modules.

    Only calls whose time and labels are known in advance are computed ahead, as in `haste.samplers.sample`. In other
    loops they may differ from the plan, and comparing tensors on a GPU would wait for it: there every call computes its
    own. The parameters of the model must not change between two full steps.

    Attributes:
        most_bytes: the most that was held at once since `start`.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.clear()
        self.most_bytes = 0

    def clear(self) -> None:
        """Forget all corrections, when a full step has changed the features."""
        self._held: dict[Branches, tuple[Tensor, int | None, dict[Timestep, Correction]]] = {}

    def get(self, branches: Branches, labels: Tensor, timestep: Timestep) -> Correction | None:
        """labels: of the whole call, of which the branches may be one half; compared by identity and version."""
        if branches not in self._held:
            return None
        made_for, as_it_was, corrections = self._held[branches]
        same = made_for is labels and as_it_was == version(labels)
        return corrections.get(timestep) if same else None

    def keep(self, branches: Branches, labels: Tensor, corrections: dict[Timestep, Correction]) -> None:
        """Replace the corrections of these branches."""
        self._held[branches] = labels, version(labels), corrections
        held = (tensor for *_, made in self._held.values() for correction in made.values() for tensor in correction)
        self.most_bytes = max(self.most_bytes, sum(tensor.nbytes for tensor in held))


@dataclass(frozen=True)
class Forecaster:
    """The weight of each cached feature in a forecast.

    taylor: TaylorSeer's as published (arXiv 2503.06923); of order 0 the last full feature again. At a full step s, with
    d the distance to the full step before it,

        T_0 = F(s),   T_{i+1} = (T_i − T_i,old) / d    for i < order,

    and x steps later F̂ = Σ_i T_i · x^i / i!. The published coordinate counts down; the sign cancels in T_i·x^i. Every
    difference is divided by the *last* distance alone, so from order 2 on this is not the interpolating polynomial.

    hermite: HiCache's (arXiv 2508.16984), the same with scaled Hermite polynomials in place of powers:

        F̂ = Σ_i T_i · σ^i H_i(σ·x) / i!,   H_{i+1}(x) = 2x·H_i(x) − 2i·H_{i−1}(x),   σ = 1/2.

    The contraction σ damps the high orders, which powers let grow. H_i is even or odd as x^i is, so signs cancel too.

    newton: the polynomial through the last order + 1 features, over the true times. Newton's divided differences and
    Lagrange's weights give the same polynomial; it is exact where the features are one of this order, however far apart
    the full steps are.

    Attributes:
        kind: which of the three.
        order: order + 1 cached features are used.
        first: differences of taylor and hermite begin at this position; what was taken before has no weight, if there
            is anything else.
    """

    kind: Literal["taylor", "hermite", "newton"]
    order: int
    first: int = 0

    @classmethod
    def of(cls, config: CacheConfig) -> Forecaster:
        """The forecaster that the settings of a cache name.

        The published code forms differences from step first_enhance − 1 on, with the step before it: the steps before
        that one take no part. Schedules without such a beginning (a list, an even spacing, an error threshold, whose
        --first-enhance is a least number of full steps) use all that is there.
        """
        kind = config.cache if config.cache in ("newton", "hermite") else "taylor"  # of order 0 it is reuse
        counted = not (config.full_steps or config.error_threshold or config.spacing == "even")
        first = max(0, config.resolved_first_enhance - 2) if counted else 0
        return cls(kind, config.resolved_order, first)  # type: ignore[arg-type]

    def weights(self, taken: Sequence[Timestep], at: Timestep) -> list[float]:
        """The weights of features taken at these timesteps, newest first, in a forecast.

        Fewer than order + 1, as early in a run, give a forecast of lower order; further ones get weight 0.
        """
        if self.kind == "newton":
            weights = _interpolation([timestep.time for timestep in taken[: self.order + 1]], at.time)
            return weights + [0.0] * (len(taken) - len(weights))
        positions = [timestep.position for timestep in taken[: self.order + 1] if timestep.position >= self.first]
        positions = positions or [timestep.position for timestep in taken[:1]]
        polynomial = _hermite if self.kind == "hermite" else pow
        return _differences(positions, len(taken), at.position, polynomial)


def _interpolation(points: Sequence[float], at: float) -> list[float]:
    """Lagrange's weights of values at these points."""
    return [
        prod((at - other) / (point - other) for k, other in enumerate(points) if k != j)
        for j, point in enumerate(points)
    ]


def _differences(
    positions: Sequence[float], count: int, at: float, polynomial: Callable[[float, int], float]
) -> list[float]:
    """Σ_i T_i · polynomial(x, i) / i! as weights of `count` features, of which those at `positions` are the newest.

    T_i are the differences of TaylorSeer, of as high an order as there are positions for.
    """
    distances = [newer - older for newer, older in pairwise(positions)]
    # terms[j]: T_i as it stood when feature j was the newest, by its coefficients over the features; i grows.
    terms = [[float(j == k) for k in range(count)] for j in range(len(positions))]
    weights = [0.0] * count
    for i in range(len(positions)):
        factor = polynomial(at - positions[0], i) / factorial(i)
        weights = [total + factor * coefficient for total, coefficient in zip(weights, terms[0], strict=True)]
        terms = [
            [(a - b) / d for a, b in zip(term, older, strict=True)]
            for term, older, d in zip(terms[:-1], terms[1:], distances[: len(terms) - 1], strict=True)
        ]
    return weights


CONTRACTION = 0.5  # HiCache's σ


def _hermite(x: float, i: int) -> float:
    """σ^i H_i(σ·x)."""
    scaled, older, value = CONTRACTION * x, 0.0, 1.0
    for n in range(i):
        older, value = value, 2 * scaled * value - 2 * n * older
    return CONTRACTION**i * value
