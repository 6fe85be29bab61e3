"""One page about one run, or several runs side by side: curves, previews, throughput, end of alignment, settings.

The page is one file that needs no network. It can be made while the runs are still training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(kw_only=True)
class Args:
    """The flags of `haste report`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, such as exps/digits."""
    output: Path | None = None
    """The page. None: report.html, in the run's folder if there is one run, else here."""


def main(args: Args) -> None:
    """Write the page, and print its path as the last line."""
    from haste.errors import UserError
    from haste.report.runs import read_run, write_report

    if not args.runs:
        raise UserError("no run is given; it must be one or more folders of runs, such as exps/digits")
    page = args.output or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    runs = [read_run(folder) for folder in args.runs]
    try:
        write_report(runs, page)
    except OSError as error:
        raise UserError(f"--output {page} cannot be written: {error.strerror}") from error
    print(page.resolve())
