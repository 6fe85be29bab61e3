"""The tools' own modules can be imported as the tools import them."""

from __future__ import annotations

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
for folder in (TOOLS / "gpu", TOOLS):  # the stages' programs find their neighbours beside them
    sys.path.insert(0, str(folder))
