"""Small problems that between them run every kernel, for the smoke test and for the sanitizers.

All operands are made on the CPU and copied, and gradients of the output are given: on a GPU nothing but the operations
runs, so that a sanitizer which watches their kernels alone sees all of what they read being written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GROUPS = ("shared", "portable", "hopper")  # kernels of their own; shared: of the operations that have one kernel each


@dataclass(frozen=True)
class Problem:
    """One call of an operation with its gradients.

    operands: device → tensors. keep: operands whose type is fixed. differentiable: the first so many get gradients.
    size: products of two numbers or so, by which problems are sorted.
    """

    operation: str
    what: str
    operands: Callable[[str], list[Tensor]]
    size: int
    differentiable: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    settings: dict[str, object] = field(default_factory=dict)
    expanded: bool = False  # grad_out is one number everywhere, as the mean's is

    @property
    def name(self) -> str:
        return f"{self.operation} {self.what}"

    def results(self, function: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
        """The value and its gradients."""
        leaves = [x.detach().requires_grad_(i in self.differentiable) for i, x in enumerate(operands)]
        if not self.differentiable:
            with torch.no_grad():
                return [function(*leaves, **self.settings)]
        rows = function(*leaves, reduction="none", **self.settings)
        if self.expanded:
            grad_out = torch.tensor(0.5, dtype=rows.dtype).to(rows.device).expand_as(rows)
        else:
            grad_out = torch.linspace(0.25, 1.0, rows.numel(), dtype=rows.dtype).view(rows.shape).to(rows.device)
        wanted = [x for x in leaves if x.requires_grad]
        return [rows.detach(), *torch.autograd.grad(rows, wanted, grad_outputs=grad_out)]

    def in_type(self, operands: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [x if i in self.keep else x.to(dtype) for i, x in enumerate(operands)]


def problems(group: str, sanitized: bool = False, heavy: bool = True) -> list[Problem]:
    """Of a group, smallest first.

    sanitized: the few that a sanitizer gets through in half a minute. heavy: with those that take several rounds of
    every block.
    """
    makers = {"shared": shared, "portable": portable, "hopper": hopper}
    chosen = makers[group](sanitized)
    return sorted((p for p in chosen if heavy or p.size < 2**26), key=lambda p: p.size)


def hopper(sanitized: bool) -> Iterator[Problem]:
    """Lengths around the tiles of 64 and 128 and the joint kernel's limit, 256; head dims that choose templates."""
    if sanitized:
        for n in (65, 129, 256, 300):
            yield attention(1, 2, n, 72, 64, BF16)
        yield attention(1, 2, 200, 64, 64, FP16)
        yield attention(1, 1, 200, 128, 128, BF16, expanded=True)
        yield from variants(BF16, 130)
        return
    for dtype in (BF16, FP16):
        for n in (1, 17, 64, 65, 128, 129, 192, 200, 256, 257, 320, 1000):
            yield attention(2, 3, n, 72, 64, dtype)
        for ds, dt in ((64, 64), (64, 128), (128, 64), (128, 128), (80, 72), (40, 24), (72, 72)):
            for n in (100, 200, 300):
                yield attention(1, 2, n, ds, dt, dtype, expanded=n == 200)
        for n in (256, 300):
            yield attention(2, 3, n, 72, 64, dtype, only="q")
            yield attention(2, 3, n, 72, 64, dtype, only="k")
        yield attention(40, 12, 256, 72, 64, dtype)
        yield attention(12, 12, 1024, 72, 64, dtype)
        yield attention(4, 4, 256, 64, 64, dtype, near=True)
        yield from variants(dtype, 256)
        yield from variants(dtype, 300)


def portable(sanitized: bool) -> Iterator[Problem]:
    if sanitized:
        for dtype, n, ds, dt in ((BF16, 65, 72, 64), (FP16, 130, 72, 64), (FP32, 65, 72, 64), (BF16, 70, 128, 128)):
            yield attention(1, 2, n, ds, dt, dtype)
        yield attention(1, 1, 40, 13, 7, BF16, expanded=True)
        yield from variants(BF16, 70)
        return
    for dtype in (BF16, FP16, FP32):
        for n in (1, 17, 64, 65, 129, 300):
            yield attention(2, 3, n, 72, 64, dtype)
        for ds, dt in ((8, 8), (16, 120), (40, 24), (64, 64), (13, 7), (96, 104), (128, 128)):
            yield attention(1, 2, 100, ds, dt, dtype, expanded=ds > 50)
        yield attention(1, 2, 100, 72, 64, dtype, only="q")
        yield attention(1, 2, 100, 72, 64, dtype, only="k")
        yield attention(16, 12, 512, 72, 64, dtype)
        yield attention(2, 2, 128, 64, 64, dtype, near=True)
        yield from variants(dtype, 150)


def variants(dtype: torch.dtype, n: int) -> Iterator[Problem]:
    """Other divergences, masks and prefixes."""
    yield attention(1, 2, n, 72, 64, dtype, student_prefix=1, teacher_prefix=5)
    for divergence, causal in (("kl", 0), ("cross_entropy", 1), ("cross_entropy", 64), ("kl", 16)):
        yield attention(1, 2, n, 72, 64, dtype, divergence=divergence, causal=causal)


def attention(
    b: int, h: int, n: int, ds: int, dt: int, dtype: torch.dtype,
    near: bool = False, only: str = "", expanded: bool = False, **settings: object,
) -> Problem:  # fmt: skip
    """q and k as views of packed projections. near: the student within 1 % of its teacher. only: of q or k."""
    longer = [int(settings.get(f"{side}_prefix", 0)) for side in ("student", "teacher")]

    def operands(device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(n + ds)
        shapes = [(b, n + more, 3, h, d) for d, more in zip((ds, dt), longer, strict=True)]
        packed = [torch.randn(shape, generator=generator) for shape in shapes]
        if near:
            packed[0] = packed[1] + 0.01 * packed[0]
        return [view for x in packed for view in x.to(dtype).to(device).permute(2, 0, 3, 1, 4)[:2]]

    words = [f"{b}x{h}x{n}", f"d {ds}/{dt}", str(dtype).removeprefix("torch.")]
    words += [f"{key} {value}" for key, value in settings.items()]
    words += [word for word, yes in (("near", near), (f"d{only} alone", only), ("expanded", expanded)) if yes]
    gradients = {"": (0, 1), "q": (0,), "k": (1,)}[only]
    size = b * h * n * n * (ds + dt)
    return Problem("attn_align_loss", ", ".join(words), operands, size, gradients, (), settings, expanded)


def shared(sanitized: bool) -> Iterator[Problem]:
    for dtype in (BF16,) if sanitized else (BF16, FP16, FP32):
        for b, n, d in ((1, 1, 8), (2, 9, 13), (2, 33, 264)) if sanitized else ((1, 1, 8), (2, 9, 13), (3, 130, 768)):
            yield from cosine(b, n, d, dtype)
            yield from taylor(b, n, d, dtype)
    if not sanitized:
        yield from cosine(64, 256, 768, BF16)
        yield from taylor(8, 256, 1152, BF16)


def cosine(b: int, n: int, d: int, dtype: torch.dtype) -> Iterator[Problem]:
    for teacher, expanded in ((dtype, False), (FP32, True)):
        shape = [(b, n, d), (b, n, d)]
        make = partial(random, shapes=shape, types=(dtype, teacher))
        what = f"{b}x{n}x{d}, {named(dtype)} and {named(teacher)}{', expanded' if expanded else ''}"
        yield Problem("token_cosine_loss", what, make, 64 * b * n * d, (0,), expanded=expanded)


# Slots and steps by which the kernel is chosen, and more than any has at once.
SLOTS = (1, 3, 5, 7)
SLOTS_AND_STEPS = ((1, 3), (3, 8), (5, 1), (5, 3), (5, 8), (7, 11))
LAYERS = 4


def taylor(b: int, n: int, d: int, dtype: torch.dtype) -> Iterator[Problem]:
    """Every form, with everything that is optional and without; of several slots one has weight 0 and is not read."""
    stream, gate = (b, n, d), (b, d)
    for slots in SLOTS:
        one = [(slots, *stream), (slots,), stream, gate]
        blocks = [(LAYERS, slots, *stream), (LAYERS, slots), (LAYERS, *gate), stream]
        for given in (2, 4):
            yield extrapolation("taylor_extrapolate", f"{slots} slots", one[:given], dtype)
            yield extrapolation("taylor_extrapolate_blocks", f"{slots} slots", blocks[:given], dtype)
    for slots, steps in SLOTS_AND_STEPS:
        one = [(slots, *stream), (steps, slots)]
        layers = [(LAYERS, slots, *stream), (steps, LAYERS, slots), (steps, LAYERS, *gate)]
        for shapes in (one, layers[:2], layers):
            yield extrapolation("taylor_extrapolate_steps", f"{slots} slots, {steps} steps", shapes, dtype)


def extrapolation(operation: str, what: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Problem:
    make = partial(random, shapes=shapes, types=(dtype, FP32, dtype, dtype), unread=1 if shapes[1][-1] > 1 else None)
    size = 64 * prod(shapes[0]) * (shapes[1][0] if operation.endswith("steps") else 1)
    return Problem(operation, f"{shapes[0]}, {what}, {len(shapes)} operands, {named(dtype)}", make, size, keep=(1,))


def random(
    device: str, shapes: list[tuple[int, ...]], types: tuple[torch.dtype, ...], unread: int | None = None
) -> list[Tensor]:
    """unread: the operand of weights, whose first slot becomes 0."""
    generator = torch.Generator().manual_seed(sum(shapes[0]))
    values = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, types, strict=False)]
    if unread is not None:
        values[unread][..., 0] = 0
    return [x.to(device) for x in values]


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
