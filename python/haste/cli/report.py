"""One page about one run, or several side by side: quality, curves, samples, throughput, end of alignment, settings.

The page is one file that needs no network. It can be made while the runs are still training.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from haste.errors import UserError


@dataclass(kw_only=True)
class ReportConfig:
    """The settings of `haste report`, which are its flags."""

    runs: Annotated[tuple[Path, ...], Positional]
    """Folders of runs, such as exps/digits."""
    output: Path | None = None
    """The page. None: report.html, in the run's folder if there is one run, else here."""

    def check(self) -> None:
        if not self.runs:
            raise UserError("no run is given; it must be one or more folders of runs, such as exps/digits")


def main(config: ReportConfig) -> None:
    """Write the page, and print its path as the last line."""
    from haste.io import writing
    from haste.report.page import is_page
    from haste.report.reading import read_run
    from haste.report.runs import write_report

    page = config.output or (config.runs[0] if len(config.runs) == 1 else Path()) / "report.html"
    if config.output is not None and os.path.lexists(page) and not is_page(page):
        raise UserError(f"--output is {page}, which is there and no page of haste report; it must be a new file")
    runs = [read_run(folder) for folder in config.runs]
    with writing(f"--output {page}"):
        write_report(runs, page)
    print(page.resolve())
