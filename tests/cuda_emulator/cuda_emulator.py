"""The CUDA kernels' own source, compiled for the host and run in a process of its own under the sanitizers.

What passes here has been *emulated*; it says nothing about any GPU. README.md says what it sees and what it does not.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from host_build import KERNELS, ROOT, build
from kernel_sources import element_types
from torch import Tensor

SOURCES = Path(__file__).parent / "src"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-DHASTE_EMULATED", "-DHASTE_HAS_HOPPER"),
    *('-DHASTE_CUDA_TARGETS="80,90,120,120+PTX"', '-DHASTE_CUDA_TOOLKIT="13.0"'),
    *(f"-I{SOURCES / 'shim'}", f"-I{SOURCES}", f"-I{ROOT / 'csrc'}"),
]
# Compiled without optimisation: what the tests run little of, so that compiling it would take longer than it saves.
SELDOM_RUN = {"taylor_extrapolate.cu", "token_cosine_loss.cu", "device.cu", "dispatch.cu", "driver.cpp", "faults.cpp"}
SCALAR_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # kernels/kernel_types.h
REFUSED = 3  # exit status of src/driver.cpp


class Emulator:
    """Runs one launch per call; tensors go in and come back with their storage, offset and strides."""

    class Refused(Exception):
        """The operation returned an error instead of a result."""

    class KernelFault(Exception):
        """The emulation or a sanitizer stopped a kernel."""

    def __init__(self, program: Path, **defaults):
        """`defaults`: values that every call passes, as those of the device that is emulated."""
        self.program, self.defaults = program, defaults

    def on(self, **defaults) -> Emulator:
        return Emulator(self.program, **self.defaults, **defaults)

    def __call__(
        self, op: str, tensors: dict[str, Tensor], returned: tuple[str, ...] = (), seed: int = 0, **values
    ) -> dict[str, Tensor]:
        """`values`: the problem's integers, floats, texts, and torch types, by the names that the driver reads."""
        header, payload = [f"op {op}", f"int seed {seed}"], []
        for name, value in (self.defaults | values).items():
            if isinstance(value, torch.dtype):
                value = SCALAR_TYPES[value]
            kind = {int: "int", float: "real", str: "text"}[type(value)]
            header.append(f"{kind} {name} {value!r}" if kind == "real" else f"{kind} {name} {value}")
        for name, tensor in tensors.items():
            content = storage_bytes(tensor)
            payload.append(content)
            header.append(f"buffer {name} {len(content)}")
            header.append(f"int {name}.offset {tensor.storage_offset() * tensor.element_size()}")
            header += [f"int {name}.stride{i} {stride}" for i, stride in enumerate(tensor.stride())]
        header += [f"return {name}" for name in returned] + ["end\n"]

        request = "\n".join(header).encode() + b"".join(payload)
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        result = subprocess.run([self.program], input=request, capture_output=True, env=environment, timeout=120)
        message = result.stderr.decode(errors="replace").strip()
        if result.returncode == REFUSED:
            raise self.Refused(message)
        if result.returncode != 0:
            raise self.KernelFault(message)
        outputs, start = {}, 0
        for name in returned:
            size = tensors[name].untyped_storage().nbytes()
            outputs[name] = with_storage(tensors[name], result.stdout[start : start + size])
            start += size
        return outputs


def storage_bytes(tensor: Tensor) -> bytes:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


def with_storage(like: Tensor, content: bytes) -> Tensor:
    """A tensor of the same type, shape, strides and offset over other bytes."""
    storage = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=like.dtype).set_(storage, like.storage_offset(), like.shape, like.stride())


@pytest.fixture(scope="session")
def emulator(request) -> Emulator:
    """The emulated kernels, compiled once per state of their sources (kept in pytest's cache)."""
    sources = sorted([*KERNELS.glob("cuda/**/*.cu"), *SOURCES.glob("*.cpp")], key=lambda path: -path.stat().st_size)
    units = []
    for source in sources:
        elements = element_types(source) if source.suffix == ".cu" else []
        own = ["-O0"] if source.name in SELDOM_RUN else []
        units += [(source, [*own, f"-DHASTE_ELEMENT={element}"]) for element in elements] or [(source, own)]
    files = [*KERNELS.glob("*.h"), *KERNELS.glob("cuda/**/*.*"), *SOURCES.rglob("*.*")]
    files = [path for path in files if path.suffix in {".h", ".cu", ".cuh", ".cpp"}]
    folder = request.config.cache.mkdir("emulated_kernels")
    return Emulator(build(folder, units, FLAGS, ["-fsanitize=address,undefined"], files))
