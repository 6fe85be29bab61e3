"""What the build says of itself, and what it says to a CUDA tensor that it cannot take."""

from __future__ import annotations

import os
import re
import subprocess
import sys

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
    assert info["compiler"] and info["cpu_paths"][0] == "portable" and info["cpu_path"] in info["cpu_paths"]
    assert bool(info["cuda_targets"]) == info["cuda"] == (info["cuda_compiler"] is not None)


def test_a_build_with_cuda_holds_every_target():
    """Those of TORCH_CUDA_ARCH_LIST where it is set, as it was for the build."""
    info = haste_ext.build_info()
    if not info["cuda"]:
        pytest.skip("built without nvcc")
    targets = re.findall(r"[\d.]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 8.6 8.9 9.0 10.0 12.0")
    assert {target.replace(".", "") for target in targets} <= {re.sub("[af]$", "", x) for x in info["cuda_targets"]}
    assert info["cuda_paths"] == _C.cuda_paths()
    assert info["cuda_paths"] == ["portable"] + ["hopper"] * bool({"90", "90a"} & set(info["cuda_targets"]))
    with pytest.raises(ValueError, match="the CUDA path is 'ampere'; it must be one .* holds: portable"):
        _C.force_cuda_path("ampere")


def test_a_path_can_be_forced_by_name_and_by_environment():
    try:
        _C.force_cpu_path("portable")
        assert haste_ext.build_info()["cpu_path"] == "portable"
    finally:
        _C.force_cpu_path("")
    code = "import haste_ext; print(haste_ext.build_info()['cpu_path'])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"HASTE_CPU_PATH": "portable", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "portable"
    with pytest.raises(ValueError, match="portable"):
        _C.force_cpu_path("sse1")


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
