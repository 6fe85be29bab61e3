"""Every test that takes `path` runs on each processor path that this machine can run."""

from __future__ import annotations

import pytest

from haste_ext import _C


@pytest.fixture(params=_C.cpu_paths())
def path(request):
    _C.force_cpu_path(request.param)
    yield request.param
    _C.force_cpu_path("")
