"""What the build says of itself, and what it says to a CUDA tensor that it cannot take."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import haste_ext
from haste_ext import _C


def test_build_info_names_everything():
    info = haste_ext.build_info()
    assert info["version"] == haste_ext.__version__
    assert info["torch_loaded"] == torch.__version__
    assert tuple(int(x) for x in info["torch"].split(".")[:2]) >= (2, 11)
    assert info["compiler"] and info["cpu_capabilities"][0] == "portable"
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert bool(info["cuda_targets"]) == info["cuda"] == (info["cuda_compiler"] is not None)


def test_a_build_with_cuda_holds_every_target():
    """Those of TORCH_CUDA_ARCH_LIST where it is set, as it was for the build."""
    info = haste_ext.build_info()
    if not info["cuda"]:
        pytest.skip("built without nvcc")
    targets = re.findall(r"[\d.]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 8.6 8.9 9.0 10.0 12.0")
    assert {target.replace(".", "") for target in targets} <= {re.sub("[af]$", "", x) for x in info["cuda_targets"]}
    assert info["cuda_kernels"] == _C.cuda_kernels()
    assert info["cuda_kernels"] == ["portable"] + ["hopper"] * bool({"90", "90a"} & set(info["cuda_targets"]))
    with pytest.raises(ValueError, match="must be one of portable.*, got 'ampere'"):
        _C.force_cuda_kernels("ampere")


def test_a_cuda_tensor_in_a_build_without_cuda_is_told_what_is_missing(monkeypatch):
    sentence = _C.missing_cuda() or "built without the CUDA kernels; run `pip install`"
    monkeypatch.setattr(_C, "missing_cuda", lambda: sentence)
    with FakeTensorMode():
        q = torch.empty(1, 1, 4, 8, device="cuda")
        with pytest.raises(RuntimeError, match="pip install"):
            haste_ext.attn_align_loss(q, q, q, q)
        with pytest.raises(RuntimeError, match="pip install"):
            haste_ext.token_cosine_loss(q, q)
        with pytest.raises(RuntimeError, match="pip install"):
            haste_ext.taylor_extrapolate(q, torch.empty(1, device="cuda"))
