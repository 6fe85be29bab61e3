"""No inner loop of a Hopper kernel costs more than recorded; and tools/kernel_counts, which counts them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[3] / "tools"
CANNOT_TELL = 77

# A loop over tiles: a wait with its retries out of line, a product, a branch over powers, a dear way for large logits,
# and a loop within it.
LISTING = """\
.text._Z6kernelv:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/              @!P0 BRA `(.L_x_5) ;
.L_x_1:
        /*0030*/                   HGMMA.64x72x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], RZ, !UPT ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/                   MUFU.EX2 R3, R3 ;
        /*0080*/                   LDS.64 R4, [R5] ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00a0*/                   FADD R3, R3, R3 ;
        /*00b0*/                   FADD R3, R3, R3 ;
        /*00c0*/                   FADD R3, R3, R3 ;
        /*00d0*/                   MUFU.EX2 R3, R3 ;
.L_x_3:
        /*00e0*/                   STSM.16.M88.4 [R6], R8 ;
.L_x_4:
        /*00f0*/                   FADD R3, R3, R3 ;
        /*0100*/               @P3 BRA `(.L_x_4) ;
        /*0110*/               @P4 BRA `(.L_x_0) ;
        /*0120*/                   EXIT ;
.L_x_5:
        /*0130*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0140*/              @!P0 BRA `(.L_x_5) ;
        /*0150*/                   BRA `(.L_x_1) ;
"""
LOADS = """\
.text._Z6kernelv:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   LDG.E R16, desc[UR4][R2.64] ;
        /*0030*/                   FADD R17, R16, R16 ;
        /*0040*/                   LDG.E.128 R12, desc[UR4][R2.64+0x20] ;
        /*0050*/                   FADD R17, R6, R17 ;
        /*0060*/                   LDG.E.128 R20, desc[UR4][R2.64] ;
        /*0070*/                   EXIT ;
"""


def load(name):
    sys.path.insert(0, str(TOOLS))
    try:
        loader = SourceFileLoader(name, str(TOOLS / name))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


@pytest.fixture(scope="module")
def counts():
    return load("kernel_counts")


def test_no_loop_costs_more_than_recorded():
    result = subprocess.run([sys.executable, TOOLS / "kernel_counts", "check"], capture_output=True, text=True)
    if result.returncode == CANNOT_TELL:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_way_through_a_loop(counts):
    """All powers and the fewest instructions: no retry, not the dear way, one round of what loops within."""
    kernel = counts.read_kernels(LISTING)["_Z6kernelv"]
    assert counts.count_rounds(kernel, (1, 2, 0)) == {
        "issue": 2 + 4 + 3 + 1 + 3 + 4 * 2,  # the inner loop five times
        "exponentials": 8,
        "tensor": 36 + 32,
        "shared": 72 * 32 / 128 + 2 * 64 * 32 / 128 + 4 * 32 * 8 / 128 + 4 * 512 / 128,
    }


def test_no_way_does_the_work(counts):
    with pytest.raises(LookupError, match=r"no way through the loop of _Z6kernelv does \(2, 2, 0\)"):
        counts.count_rounds(counts.read_kernels(LISTING)["_Z6kernelv"], (2, 2, 0))


def test_loads_in_flight(counts):
    assert counts.read_kernels(LOADS)["_Z6kernelv"].loads_in_flight() == 3
    used_early = LOADS.replace("FADD R17, R16, R16", "FADD R17, R9, R9")
    assert counts.read_kernels(used_early)["_Z6kernelv"].loads_in_flight() == 2


def test_what_is_worse_than_the_record(counts):
    recorded = {"a": {"issue": 10.0}, "b": {"loads": 4.0}, "gone": {}}
    assert counts.compare({"a": {"issue": 10.4}, "b": {"loads": 5}, "gone": {}}, recorded) == []
    worse = counts.compare({"a": {"issue": 10.6}, "b": {"loads": 3}, "new": {}}, recorded)
    assert worse == [
        "new is not in the record",
        "gone is recorded and was not counted",
        "a: issue 11; 10 are recorded",
        "b: loads 3; 4 are recorded",
    ]


def test_a_record_reads_as_it_was_written(counts, tmp_path):
    rows = {"joint bfloat16 72/64, its dq": {"issue": 7.0, "shared": 3.0}, "taylor": {"loads": 4.0}}
    path = tmp_path / "record.txt"
    path.write_text(counts.lay_out(rows, "# nvcc 13.0: clocks"))
    assert counts.read_record(path) == (rows, "13.0")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    (
        (["check", "/nope"], "RECORD must be a file that `tools/kernel_counts accept` wrote, got /nope"),
        (["check", __file__], f"RECORD must be a file that `tools/kernel_counts accept` wrote, got {__file__}"),
        (["accept", "/nope/r"], "RECORD must be a file in a folder that there is"),
        (["loads", "/nope"], "SOURCE must be a .cu file of this tree, got /nope"),
        (["loads", __file__], f"SOURCE must be a .cu file of this tree, got {__file__}"),
    ),
)
def test_what_cannot_be_used_is_refused_in_a_sentence(arguments, sentence):
    result = subprocess.run([sys.executable, TOOLS / "kernel_counts", *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(sentence)
