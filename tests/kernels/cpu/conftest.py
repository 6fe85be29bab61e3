"""Every test that takes `isa` runs on each instruction set that this machine can run; one that takes `attn_align_loss`
gets that operation on each of them and, wherever AVX-512 runs, on emulated AMX tiles."""

from __future__ import annotations

import emulated_amx
import pytest

import haste_ext
from haste_ext import _C

EMULATED = "emulated amx"


@pytest.fixture(params=_C.cpu_capabilities())
def isa(request):
    _C.force_cpu_capability(request.param)
    yield request.param
    _C.force_cpu_capability("")


@pytest.fixture(scope="session")
def emulated(request) -> emulated_amx.EmulatedAmx:
    if "avx512" not in _C.cpu_capabilities():
        pytest.skip("emulated AMX needs a processor with AVX-512")
    return emulated_amx.EmulatedAmx(emulated_amx.compile_library(request.config.cache.mkdir("emulated_amx")))


@pytest.fixture(params=[*_C.cpu_capabilities(), EMULATED])
def attn_align_loss(request):
    if request.param == EMULATED:
        yield request.getfixturevalue("emulated")
    else:
        _C.force_cpu_capability(request.param)
        yield haste_ext.attn_align_loss
        _C.force_cpu_capability("")
