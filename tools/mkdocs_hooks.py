"""Hooks of mkdocs: links that leave docs/, the plots of benchmarks/, and the tables of settings."""

from __future__ import annotations

import importlib
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

from haste.cli.main import COMMANDS, field_docstrings
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
IMAGE = re.compile(r"!\[([^\]]*)\]\(\.\./(benchmarks/[^)]+\.png)\)")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)]+)\)")
SETTINGS = re.compile(r"<!-- the table of each command.*?-->")


def on_files(files, config):
    """Copy the plots of benchmarks/ into the site."""
    for path in sorted(ROOT.glob("benchmarks/**/*.png")):
        files.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Show plots from the site, other files outside docs/ by their path, and settings as tables."""
    markdown = LINK.sub(r"\1 (`\2`)", IMAGE.sub(r"![\1](\2)", markdown))
    return SETTINGS.sub(lambda _: settings_tables(), markdown)


def settings_tables() -> str:
    """A table of settings for each command, from the fields of its dataclass and the docstrings below them."""
    parts = []
    for command, (summary, where) in COMMANDS.items():
        module, _, name = where.partition(":")
        config = getattr(importlib.import_module(module), name)
        docs = {field: text.replace("|", "\\|") for field, text in field_docstrings(config).items()}
        rows = [f"| `{flag(f)}` | {default(f)} | {docs.get(f.name, '')} |" for f in fields(config)]
        parts += [f"## haste {command}", f"{summary[0].upper()}{summary[1:]}.", "\n".join([HEADER, *rows])]
    return "\n\n".join(parts)


HEADER = "| flag | default | |\n|---|---|---|"


def flag(field: Field) -> str:
    """How a setting is typed."""
    return f"{field.name.upper()} ..." if "Positional" in str(field.type) else f"--{field.name.replace('_', '-')}"


def default(field: Field) -> str:
    """The default of a setting, for a table."""
    if field.default is MISSING or field.default in ("", None):
        return ""
    return f"`{field.default}`"
