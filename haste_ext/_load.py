"""What binds this package to torch: the compiled module, and every private name of torch that is used.

Importing this loads the module, which registers ``torch.ops.haste.*``, or raises an ImportError that says why it
cannot. Look here when a new torch comes; the module has one more private name, ``aoti_torch_get_current_cuda_stream``
in csrc/ops/common.cpp.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # before the compiled module, which uses libtorch's symbols
from torch import Tensor
from torch.autograd import forward_ad

HERE = Path(__file__).resolve().parent


def holds_module(folder: Path) -> bool:
    return any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def folder_of_module() -> Path:
    """Where the compiled module is: here, or, of a source folder in which nothing is built, in the installed package.

    In a source folder Python takes this package from there, for that comes first on its path.
    """
    folders = [HERE, *(Path(entry or ".").resolve() / "haste_ext" for entry in sys.path)]
    for folder in folders:
        if holds_module(folder):
            return folder
    raise ImportError(
        f"haste_ext in {HERE} holds no module that was compiled for this Python: run `pip install .` in the source "
        "folder",
        name="haste_ext._C",
    )


folder = folder_of_module()
if folder != HERE:
    sys.modules["haste_ext"].__path__.append(str(folder))
try:
    from haste_ext import _C  # type: ignore[attr-defined]  # the compiled module
except ImportError as error:
    raise ImportError(
        f"haste_ext's compiled module does not load under torch {torch.__version__} ({error}): run "
        "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder",
        name="haste_ext._C",
    ) from error


def check_environment() -> None:
    """ImportError for a build of an older source, or for HASTE_CPU_CAPABILITY or HASTE_CUDA_KERNELS that it lacks."""
    if not hasattr(_C, "cpu_capabilities"):
        raise ImportError(
            f"haste_ext's compiled module, {_C.__file__}, is of an older source than {HERE}: run `pip install "
            "--no-build-isolation --force-reinstall --no-deps .` in the source folder",
            name="haste_ext._C",
        )
    for variable, held in (("HASTE_CPU_CAPABILITY", _C.cpu_capabilities()), ("HASTE_CUDA_KERNELS", _C.cuda_kernels())):
        given = os.environ.get(variable)
        if given and held and given not in held:  # a build without CUDA has no use for CUDA kernels
            raise ImportError(f"{variable} must be one of {', '.join(held)}, got '{given}'", name="haste_ext._C")


check_environment()


def build_info() -> dict[str, object]:
    """What this build holds.

    Returns:
        ``version``; ``torch`` (built against) and ``torch_loaded``; ``compiler``; ``cuda`` (bool), ``cuda_compiler``,
        ``cuda_targets`` (e.g. ``["80", "90"]``) and ``cuda_kernels`` (``portable`` and, built for 9.0, ``hopper``,
        which a device of compute capability 9.0 takes by itself; ``HASTE_CUDA_KERNELS`` chooses one);
        ``cpu_capabilities`` (the instruction sets that can run here, narrowest first) and ``cpu_capability`` (the one
        in force; ``HASTE_CPU_CAPABILITY`` chooses another).
    """
    return {**_C.build_info(), "torch_loaded": torch.__version__}


# ---- private names of torch ----

functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active

# Flash attention by itself, with the log-sum-exp that scaled_dot_product_attention keeps to itself.
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_attention_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def below_autograd() -> AbstractContextManager:
    """A context in which calls go straight to the kernels, also with operands that require gradients."""
    return torch._C._AutoDispatchBelowAutograd()


def is_differentiated_by_functorch(value: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(value):
        value = functorch.get_unwrapped(value)
    return functorch.is_gradtrackingtensor(value)


def forward_mode_is_active() -> bool:
    return forward_ad._current_level >= 0


def argument_names(overload: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in overload._schema.arguments]


def create_cuda_function(code: str) -> Callable[..., Tensor]:
    """An elementwise CUDA function, compiled from its source at run time; RuntimeError where it cannot be."""
    return torch.cuda.jiterator._create_jit_fn(code)
