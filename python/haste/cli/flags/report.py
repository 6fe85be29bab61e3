"""One page about one run, or several side by side: quality, curves, previews, throughput, end of alignment, settings.

The page is one file that needs no network. It can be made while the runs are still training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from haste.errors import UserError


@dataclass(kw_only=True)
class Args:
    """The flags of `haste report`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, such as exps/digits."""
    output: Path | None = None
    """The page. None: report.html, in the run's folder if there is one run, else here."""

    def check(self) -> None:
        if not self.runs:
            raise UserError("no run is given; it must be one or more folders of runs, such as exps/digits")
