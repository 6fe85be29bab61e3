"""What holds for the sources of csrc as files."""

from __future__ import annotations

import ast
import subprocess

from host_build import ROOT, host_compiler

CUDA_HEADERS = "/usr/local/cuda/include"


def test_no_header_has_the_name_of_a_system_header():
    """Else an include path that reaches into csrc, now or some day, would give a library ours for its own."""
    names = sorted({path.name for path in (ROOT / "csrc").rglob("*.h*")} | {p.name for p in ROOT.glob("csrc/**/*.cuh")})
    assert "kernels.h" in names
    asks = [f'#if __has_include(<{name}>)\n#error "{name}"\n#endif' for name in [*names, "math.h"]]
    command = [*host_compiler(), "-E", "-x", "c++", "-isystem", CUDA_HEADERS, "-"]
    result = subprocess.run(command, input="\n".join(asks), capture_output=True, text=True)
    taken = [name for name in names if f'#error "{name}"' in result.stderr]
    assert '#error "math.h"' in result.stderr, "the compiler does not tell"
    assert taken == []


def test_every_operation_has_its_files():
    """CMake takes the names from csrc/operations.h and would leave out what nobody names there."""
    code = (ROOT / "csrc/operations.h").read_text()
    named = {line.split("(")[1].split(",")[0] for line in code.splitlines() if line.startswith("  X(")}
    for folder in ("ops", "kernels/cpu"):
        found = {path.stem for path in (ROOT / "csrc" / folder).glob("*.cpp")} - {"common", "dispatch"}
        assert found == named, folder


def test_the_private_names_of_torch_stand_in_one_file():
    for path in sorted((ROOT / "haste_ext").rglob("*.py")):
        if path.name == "_load.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            private = [part for part in chain.split(".")[1:] if part.startswith("_") and not part.startswith("__")]
            assert not (chain.startswith(("torch.", "forward_ad.")) and private), f"{path}:{node.lineno}: {chain}"
