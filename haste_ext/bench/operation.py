"""What the benchmark knows of an operation: its shapes, the ways of writing it, and the least work that it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Phase:
    """One pass over the data and the least that it must do, however it is written."""

    bytes: int  # every tensor read or written once
    matmul_flops: int = 0
    other_flops: int = 0
    exps: int = 0


@dataclass(frozen=True)
class Case(ABC):
    """One shape of an operation in one type on one device. Operations add their own dimensions."""

    batch: int
    tokens: int
    dtype: torch.dtype
    device: str

    @abstractmethod
    def inputs(self, near: bool = False) -> list[Tensor]:
        """Fresh random operands, the same for the same case; `near`: with the student within 1 % of its teacher."""

    @abstractmethod
    def phases(self) -> list[Phase]:
        """Forward, then backward where there is one."""

    @abstractmethod
    def float64_bytes_per_sample(self) -> int:
        """About what the definition in float64 holds for one sample of the batch."""

    def reduced_to(self, float64_bytes: int) -> Case:
        """The case with as many samples of the batch as the definition in float64 can have for so much memory."""
        return replace(self, batch=max(1, min(self.batch, float64_bytes // self.float64_bytes_per_sample())))

    @property
    def element_size(self) -> int:
        return self.dtype.itemsize

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

    @classmethod
    def own_fields(cls) -> list[str]:
        """The dimensions that this operation adds: names of command line flags."""
        return [f.name for f in fields(cls) if f.name not in ("batch", "tokens", "dtype", "device")]


@dataclass(frozen=True)
class Contender:
    """One way of writing an operation, as a function of the case's inputs."""

    name: str
    function: Callable[..., Tensor]
    compiled: bool = False  # by torch.compile, anew for every case
    prepare: Callable[..., Sequence] | None = None  # turns the inputs into what this way keeps at hand; not timed
    missing: Callable[[Case], str | None] = field(default=lambda case: None)  # why it cannot run such a case


@dataclass(frozen=True)
class Operation:
    """An operation, its contenders (the last is ours) and how it is judged."""

    name: str
    case: type[Case]
    reference: Callable[..., Tensor]  # the definition: exact in float64, the yardstick in the case's own type
    contenders: tuple[Contender, ...]
    baseline: str  # the contender that speed is given relative to
    results: tuple[str, ...]  # what forward + backward give: the output, then gradients of the first inputs
    default_batch: int
    cases_near_convergence: bool = False
    bandwidth_bound: bool = False  # timed beside a plain copy of the same bytes

    @property
    def ours(self) -> str:
        return self.contenders[-1].name

    def result_names(self, forward_only: bool) -> tuple[str, ...]:
        return self.results[:1] if forward_only else self.results


Call = Callable[[], tuple[Tensor, ...]]


def bind(function: Callable[..., Tensor], inputs: Sequence, gradients: int, forward_only: bool) -> Call:
    """A call that returns the output and, unless `forward_only`, its gradients for the first so many inputs.

    A forward alone is training's: it saves what a backward would need. Operations without gradients run under no_grad.
    """
    if gradients == 0:

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*inputs),)

        return infer

    leaves = [x.detach().requires_grad_() for x in inputs[:gradients]]

    def train() -> tuple[Tensor, ...]:
        loss = function(*leaves, *inputs[gradients:])
        return (loss.detach(),) if forward_only else (loss.detach(), *torch.autograd.grad(loss, leaves))

    return train
