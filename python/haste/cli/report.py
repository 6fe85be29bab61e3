"""Carries out `haste report`: reads the runs and writes the page."""

from __future__ import annotations

import os
from pathlib import Path

from haste.cli.flags.report import Args
from haste.errors import UserError
from haste.io import writing
from haste.report.page import is_page
from haste.report.reading import read_run
from haste.report.runs import write_report


def main(args: Args) -> None:
    """Write the page, and print its path as the last line."""
    page = args.output or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    if args.output is not None and os.path.lexists(page) and not is_page(page):
        raise UserError(f"--output is {page}, which is there and no page of haste report; it must be a new file")
    runs = [read_run(folder) for folder in args.runs]
    with writing(f"--output {page}"):
        write_report(runs, page)
    print(page.resolve())
