"""attn_align_loss on AMX tiles emulated in software: the kernel's own source, on any processor with AVX-512.

The library is compiled for the tests alone, once per state of its sources; the package holds no emulation.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from host_build import KERNELS, ROOT, build
from torch import Tensor

from haste_ext.ops.common import reduce

EMULATION = ROOT / "tests/kernels/cpu/emulation"
FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-w", f"-I{KERNELS.parent}"),
]
UNITS = [
    (KERNELS / "cpu/isa/attn_align_loss_bf16.cpp", ["-DHASTE_ISA=amx", "-include", EMULATION / "amx.h"]),
    (KERNELS / "cpu/isa/attn_align_loss.cpp", ["-DHASTE_ISA=avx512", "-DHASTE_COMPUTE=float"]),
    (KERNELS / "cpu/isa/attn_align_loss.cpp", ["-DHASTE_ISA=avx512", "-DHASTE_COMPUTE=double"]),
    (KERNELS / "cpu/attn_align_loss.cpp", []),
    (EMULATION / "attn_align_loss.cpp", []),
]
SCALAR_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/kernels/kernel_types.h


# The structures of csrc/kernels/attn_align_loss.h.
class Operand(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("type", c_int), ("dim", c_int64), ("strides", c_int64 * 3)]


class Problem(ctypes.Structure):
    _fields_ = [
        *(("sizes", c_int64 * 3), ("operands", Operand * 4), ("scales", c_double * 2)),
        *(("kl", c_bool), ("causal", c_int64)),
    ]


class Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p * 3)]


class Strided(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("strides", c_int64 * 3)]


class Backward(ctypes.Structure):
    _fields_ = [("grad_out", Strided), ("softmax", c_void_p * 2), ("gradients", Strided * 2)]


def compile_library(folder: Path) -> Path:
    """The library in `folder`, compiled unless it is there for this very state of the sources."""
    files = [*KERNELS.glob("*.h"), *KERNELS.glob("cpu/*.*"), *KERNELS.glob("cpu/isa/*"), *EMULATION.iterdir()]
    return build(folder, UNITS, FLAGS, ["-shared"], [path for path in files if path.is_file()])


class EmulatedAmx:
    """Called as haste_ext.attn_align_loss is. The work is divided as among torch's threads, and done one by one."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.forward.argtypes = [POINTER(Problem), POINTER(Rows), c_int64]
        self.library.backward.argtypes = [POINTER(Problem), POINTER(Backward), c_int64]

    def __call__(
        self, *tensors: Tensor, student_scale=None, teacher_scale=None, reduction="mean", divergence="cross_entropy",
        causal=0,
    ) -> Tensor:  # fmt: skip
        scales = [
            x.shape[-1] ** -0.5 if scale is None else scale
            for x, scale in ((tensors[0], student_scale), (tensors[2], teacher_scale))
        ]
        settings = scales, divergence == "kl", causal
        return reduce(_EmulatedRows.apply(*tensors, settings, torch.get_num_threads(), self.library), reduction)


class _EmulatedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, settings, threads, library = inputs
        student = tensors[0]
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        loss = torch.empty(student.shape[:3], dtype=dtype)
        softmax = [torch.empty(*loss.shape, 2, dtype=dtype) for _ in range(2)]
        rows = Rows((c_void_p * 3)(*(x.data_ptr() for x in (loss, *softmax))))
        library.forward(_problem(tensors, *settings), rows, threads)
        ctx.save_for_backward(*tensors, *softmax)
        ctx.rest = settings, threads, library
        return loss

    @staticmethod
    def backward(ctx, grad_out):
        *tensors, student_softmax, teacher_softmax = ctx.saved_tensors
        settings, threads, library = ctx.rest
        gradients = [
            torch.empty_like(x) if need else None for x, need in zip(tensors[:2], ctx.needs_input_grad[:2], strict=True)
        ]
        call = Backward(
            _strided(grad_out),
            (c_void_p * 2)(student_softmax.data_ptr(), teacher_softmax.data_ptr()),
            (Strided * 2)(*(Strided() if x is None else _strided(x) for x in gradients)),
        )
        library.backward(_problem(tensors, *settings), call, threads)
        return *gradients, None, None, None, None, None


def _strided(x: Tensor) -> Strided:
    return Strided(x.data_ptr(), (c_int64 * 3)(*x.stride()[:3]))


def _problem(tensors: list[Tensor], scales: list[float], kl: bool, causal: int) -> Problem:
    operands = (
        Operand(x.data_ptr(), SCALAR_TYPES[x.dtype], x.shape[3], (c_int64 * 3)(*x.stride()[:3])) for x in tensors
    )
    sizes = (c_int64 * 3)(*tensors[0].shape[:3])
    return Problem(sizes, (Operand * 4)(*operands), (c_double * 2)(*scales), kl, causal)
