"""Which instruction set runs: the one that was forced, the one of the environment, else the widest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import haste_ext
from haste_ext import _C


def isa_in_new_process(name: str) -> subprocess.CompletedProcess[str]:
    code = "import haste_ext; print(haste_ext.build_info()['cpu_capability'])"
    environment = {**os.environ, "HASTE_CPU_CAPABILITY": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_portable_is_always_there_and_the_widest_is_in_force():
    assert _C.cpu_capabilities()[0] == "portable"
    assert haste_ext.build_info()["cpu_capabilities"] == _C.cpu_capabilities()
    assert isa_in_new_process("").stdout.strip() == _C.cpu_capabilities()[-1]


def test_a_forced_isa_is_in_force_until_it_is_given_up(isa):
    assert haste_ext.build_info()["cpu_capability"] == isa
    _C.force_cpu_capability("")
    assert haste_ext.build_info()["cpu_capability"] == _C.cpu_capabilities()[-1]


def test_the_environment_chooses_an_isa():
    assert isa_in_new_process("portable").stdout.strip() == "portable"


def test_an_unknown_isa_is_refused_with_those_that_can_run():
    with pytest.raises(ValueError, match=r"the CPU capability must be one of portable.*, got 'sse9'"):
        _C.force_cpu_capability("sse9")
    result = isa_in_new_process("sse9")
    assert result.returncode != 0 and "HASTE_CPU_CAPABILITY must be one of portable" in result.stderr


def test_isas_agree_though_not_to_the_last_bit(isa):
    """Guards against one that is named but not taken: the vector width shows in the last bits of long sums."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 64, 1001, generator=generator, dtype=torch.float64)
    ours = haste_ext.token_cosine_loss(student, teacher, reduction="none")
    _C.force_cpu_capability("portable")
    portable = haste_ext.token_cosine_loss(student, teacher, reduction="none")
    torch.testing.assert_close(ours, portable, rtol=1e-12, atol=1e-15)
    assert torch.equal(ours, portable) == (isa == "portable")
