"""Every test that takes `path` runs on each processor path that this machine can run; one that takes `attn_align_loss`
gets that operation on each of them and, wherever AVX-512 runs, on emulated AMX tiles."""

from __future__ import annotations

import os
import shlex
import shutil

import emulated_amx
import pytest
from one_at_a_time import one_at_a_time

import haste_ext
from haste_ext import _C

EMULATED = "emulated amx"


@pytest.fixture(params=_C.cpu_paths())
def path(request):
    _C.force_cpu_path(request.param)
    yield request.param
    _C.force_cpu_path("")


@pytest.fixture(scope="session")
def emulated(request) -> emulated_amx.EmulatedAmx:
    if "avx512" not in _C.cpu_paths():
        pytest.skip("emulated AMX needs a processor with AVX-512")
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} to compile the AMX kernel with its emulation; CXX names another compiler")
    folder = request.config.cache.mkdir("emulated_amx")
    try:
        with one_at_a_time(folder):
            return emulated_amx.EmulatedAmx(emulated_amx.compile_library(folder))
    except emulated_amx.CompileError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(params=[*_C.cpu_paths(), EMULATED])
def attn_align_loss(request):
    if request.param == EMULATED:
        yield request.getfixturevalue("emulated")
    else:
        _C.force_cpu_path(request.param)
        yield haste_ext.attn_align_loss
        _C.force_cpu_path("")
