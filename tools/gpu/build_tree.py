"""Builds the tree in place for one architecture, and writes what the build holds to the file it is given, as JSON.

    build_tree.py FILE [built]      built: it is there already

TORCH_CUDA_ARCH_LIST names the architecture.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(output: str, built: str = "") -> int:
    if not built:
        result = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT)
        if result.returncode:
            return result.returncode
    import haste_ext

    info = haste_ext.build_info()
    print(info)
    if not info["cuda"]:
        print("this build holds no CUDA kernels: nvcc was not found, or HASTE_CUDA is 0", file=sys.stderr)
        return 1
    Path(output).write_text(json.dumps(info))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
