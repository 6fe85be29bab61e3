"""The benchmarked operations: their shapes, the ways of writing each, and the least work that each is.

To add an operation, write its Case and add it to OPERATIONS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

import haste_ext
from haste_ext import reference
from haste_ext.bench import baselines
from haste_ext.bench.measure import Call


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
    """An operation, its contenders (the last is ours) and how it is checked."""

    name: str
    case: type[Case]
    reference: Callable[..., Tensor]  # the definition: exact in float64, eager code in the case's own type
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


@dataclass(frozen=True)
class FeatureCase(Case):
    """Projected student tokens against the teacher's, of its width: 768 for DINOv2-B."""

    feature_dim: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        student, teacher = (self.randn(self.batch, self.tokens, self.feature_dim, seed=seed) for seed in (0, 1))
        return [teacher + 0.01 * student if near else student, teacher]

    def phases(self) -> list[Phase]:
        rows = self.batch * self.tokens
        values = rows * self.feature_dim
        return [
            Phase(2 * values * self.element_size + 4 * rows, other_flops=6 * values),  # three dot products
            Phase(3 * values * self.element_size + 4 * rows, other_flops=9 * values),  # again, and two terms summed
        ]

    def float64_bytes_per_sample(self) -> int:
        return 6 * 8 * self.tokens * self.feature_dim


@dataclass(frozen=True)
class AttentionCase(Case):
    """The aligned heads of one layer, as in HASTE on SiT-XL/2 with DINOv2-B: 12 heads of 72 against 12 of 64."""

    heads: int
    student_dim: int
    teacher_dim: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        """q, k of student and teacher as views of packed (B, N, 3, H, D) projections."""
        student, teacher = (
            self.randn(self.batch, self.tokens, 3, self.heads, dim, seed=seed)
            for seed, dim in enumerate((self.student_dim, self.teacher_dim))
        )
        if near:
            student = self.as_teacher(teacher) + 0.01 * student
        return [view for packed in (student, teacher) for view in packed.permute(2, 0, 3, 1, 4)[:2]]

    def as_teacher(self, teacher: Tensor) -> Tensor:
        """The teacher in the student's head dim: the same logits q·kᵀ/√D if that is no smaller."""
        same = pad(teacher[..., : self.student_dim], (0, max(0, self.student_dim - self.teacher_dim)))
        return same * (self.student_dim / self.teacher_dim) ** 0.25

    def phases(self) -> list[Phase]:
        rows = self.batch * self.heads * self.tokens
        student, teacher = rows * self.student_dim, rows * self.teacher_dim
        operands = 2 * (student + teacher) * self.element_size
        logits = 2 * self.tokens * (student + teacher)
        gradients = 4 * self.tokens * student
        exps = 2 * rows * self.tokens  # one for each entry of either map
        return [
            Phase(operands + 4 * rows, matmul_flops=logits, exps=exps),
            Phase(operands + 2 * student * self.element_size, matmul_flops=logits + gradients, exps=exps),
        ]

    def float64_bytes_per_sample(self) -> int:
        return 6 * 8 * self.heads * self.tokens**2  # the maps

    def reduced_to(self, float64_bytes: int) -> AttentionCase:
        """Fewer heads too where one sample's maps are too many."""
        heads = float64_bytes // (self.float64_bytes_per_sample() // self.heads)
        fewer = replace(self, heads=max(1, min(self.heads, heads)))
        return replace(fewer, batch=super().reduced_to(float64_bytes).batch)


@dataclass(frozen=True)
class ModuleCase(Case):
    """One attention or MLP output of a SiT, order + 1 snapshots of it, its gate and the residual stream."""

    width: int
    order: int

    @property
    def modules(self) -> int:
        return 1

    def inputs(self, near: bool = False) -> list[Tensor]:
        """snapshots (K, B, N, D), weights (K,), residual (B, N, D), gate (B, D)."""
        stream = (self.batch, self.tokens, self.width)
        return [
            self.randn(self.order + 1, *stream, seed=0),
            torch.tensor(baselines.taylor_weights(self.order), device=self.device),
            self.randn(*stream, seed=1),
            self.randn(self.batch, self.width, seed=2),
        ]

    def phases(self) -> list[Phase]:
        values, slots = self.batch * self.tokens * self.width, self.order + 1
        size = (self.modules * slots + 2) * values + self.modules * self.batch * self.width
        return [Phase(size * self.element_size + 4 * slots, other_flops=self.modules * (2 * slots + 2) * values)]

    def float64_bytes_per_sample(self) -> int:
        return (self.modules * (self.order + 1) + 6) * 8 * self.tokens * self.width


@dataclass(frozen=True)
class NetworkCase(ModuleCase):
    """Every attention and MLP output of a SiT: 2 · depth modules with order + 1 snapshots each."""

    layers: int

    @property
    def modules(self) -> int:
        return self.layers

    def inputs(self, near: bool = False) -> list[Tensor]:
        """snapshots (L, K, B, N, D), weights (K,), gates (L, B, D), residual (B, N, D)."""
        stream = (self.batch, self.tokens, self.width)
        return [
            self.randn(self.layers, self.order + 1, *stream, seed=0),
            torch.tensor(baselines.taylor_weights(self.order), device=self.device),
            self.randn(self.layers, self.batch, self.width, seed=1),
            self.randn(*stream, seed=2),
        ]


@dataclass(frozen=True)
class SkippedStepsCase(NetworkCase):
    """The modules of NetworkCase, and the `steps` steps that follow a full one: the first, the second, ..."""

    steps: int

    def inputs(self, near: bool = False) -> list[Tensor]:
        """snapshots (L, K, B, N, D), weights (S, K), gates (S, L, B, D)."""
        weights = [baselines.taylor_weights(self.order, ahead, self.steps + 1) for ahead in range(1, self.steps + 1)]
        return [
            self.randn(self.layers, self.order + 1, self.batch, self.tokens, self.width, seed=0),
            torch.tensor(weights, device=self.device),
            self.randn(self.steps, self.layers, self.batch, self.width, seed=1),
        ]

    def phases(self) -> list[Phase]:
        values, slots = self.batch * self.tokens * self.width, self.order + 1
        size = (self.layers * slots + self.steps) * values + self.steps * self.layers * self.batch * self.width
        flops = self.steps * self.layers * (2 * slots + 2) * values
        return [Phase(size * self.element_size + 4 * self.steps * slots, other_flops=flops)]


def missing_flash(case: Case) -> str | None:
    if case.device == "cuda" and case.dtype not in (torch.float16, torch.bfloat16):
        return "torch's flash attention on CUDA takes float16 and bfloat16 only"
    return None


_OPERATIONS = (
    Operation(
        name="attn_align_loss",
        case=AttentionCase,
        reference=reference.attn_align_loss,
        contenders=(
            Contender("eager, log(softmax)", baselines.attention_log_of_softmax),
            Contender("eager, log_softmax", baselines.attention_log_softmax),
            Contender("torch.compile", baselines.attention_log_softmax, compiled=True),
            Contender("flash composition", baselines.flash_composition, missing=missing_flash),
            Contender("haste", haste_ext.attn_align_loss),
        ),
        baseline="eager, log_softmax",
        results=("loss", "dq", "dk"),
        default_batch=8,
        cases_near_convergence=True,
    ),
    Operation(
        name="token_cosine_loss",
        case=FeatureCase,
        reference=reference.token_cosine_loss,
        contenders=(
            Contender("eager, by sample", baselines.cosine_by_sample),
            Contender("eager, vectorised", baselines.cosine_vectorised),
            Contender("torch.compile", baselines.cosine_vectorised, compiled=True),
            Contender("haste", haste_ext.token_cosine_loss),
        ),
        baseline="eager, vectorised",
        results=("loss", "gradient"),
        default_batch=64,
        cases_near_convergence=True,
        bandwidth_bound=True,
    ),
    Operation(
        name="taylor_extrapolate",
        case=ModuleCase,
        reference=reference.taylor_extrapolate,
        contenders=(
            Contender("eager, recurrence", baselines.recurrence_of_module, prepare=baselines.prepare_of_module),
            Contender("eager, weighted sum", baselines.weighted_sum_of_module),
            Contender("torch.compile", baselines.weighted_sum_of_module, compiled=True),
            Contender("haste", haste_ext.taylor_extrapolate),
        ),
        baseline="eager, recurrence",
        results=("forecast",),
        default_batch=32,
        bandwidth_bound=True,
    ),
    Operation(
        name="taylor_extrapolate_blocks",
        case=NetworkCase,
        reference=reference.taylor_extrapolate_blocks,
        contenders=(
            Contender("eager, recurrence", baselines.recurrence_of_blocks, prepare=baselines.prepare_of_blocks),
            Contender("eager, weighted sum", baselines.weighted_sum_of_blocks),
            Contender("torch.compile", baselines.one_reduction, compiled=True),
            Contender("haste", haste_ext.taylor_extrapolate_blocks),
        ),
        baseline="eager, recurrence",
        results=("forecast",),
        default_batch=2,
        bandwidth_bound=True,
    ),
    Operation(
        name="taylor_extrapolate_steps",
        case=SkippedStepsCase,
        reference=reference.taylor_extrapolate_steps,
        contenders=(
            Contender("eager, recurrence", baselines.recurrence_of_steps, prepare=baselines.prepare_of_steps),
            Contender("torch.compile", baselines.reductions_of_steps, compiled=True),
            Contender("haste, step by step", baselines.call_by_call_of_steps),
            Contender("haste", haste_ext.taylor_extrapolate_steps),
        ),
        baseline="eager, recurrence",
        results=("corrections",),
        default_batch=2,
        bandwidth_bound=True,
    ),
)
OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _OPERATIONS}
