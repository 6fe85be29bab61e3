"""What README and docs/ say can be done as they say it: links lead somewhere, commands and flags parse, Python compiles
and calls what exists, and the tests and tools that they name are there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import haste
import pytest
from haste.cli.main import COMMANDS, read_flags
from haste.errors import UserError

import haste_ext

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "haste_ext/README.md", ROOT / "benchmarks/README.md"]
)
FLAGS_OF_OTHERS = {  # of accelerate, torchrun, pip, tools/gpu_check and the benchmarks
    "--multi_gpu", "--use_fsdp", "--fsdp_version",
    "--nproc_per_node", "--no-deps", "--device", "--training", "--sampling", "--cifar10", "--model", "--rounds",
    "--precision", "--dtype",
}  # fmt: skip
HISTORY = "CHANGELOG.md"  # names what is no more


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)


@cache
def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """The code within the lines of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page."""
    text = "\n".join(block for language, block in blocks(page) if language == "sh").replace("\\\n", " ")
    lines = text.splitlines() + [span for span in spans(page) if re.match(r"haste \w+ -|pytest |python ", span)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_haste(words: list[str]) -> list[str] | None:
    """What follows `haste` or `python -m haste` in a command, if it is one of haste's."""
    if words[0] == "haste":
        return words[1:]
    for i, word in enumerate(words[:-1]):
        if word == "-m" and words[i + 1] == "haste":
            return words[i + 2 :]
    return None


OUR_COMMANDS = sorted(
    {tuple(rest) for page in PAGES if page.name != HISTORY for words in commands(page) if (rest := of_haste(words))}
)


def test_readme_is_read_to_the_end():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("words", OUR_COMMANDS, ids=" ".join)
def test_commands_of_haste_parse(words, tmp_path, monkeypatch):
    """Through the real parser, beside the YAML files that a page shows; nothing is loaded, nothing runs."""
    monkeypatch.chdir(tmp_path)
    for language, block in (found for page in PAGES for found in blocks(page)):
        if language == "yaml":
            (tmp_path / block.split()[1]).write_text(block)  # its first line is a comment with the name
    command, *arguments = words
    assert command in COMMANDS
    if not arguments or arguments == ["--preset"] or "RUN" in arguments:  # which list, or stand for others
        return
    try:
        read_flags(command, arguments)
    except UserError as error:
        assert "does not exist" in str(error)


def test_there_are_commands():
    assert len(OUR_COMMANDS) > 15


def test_every_setting_is_described():
    """In the tables of docs/settings.md, which come from the docstrings of the dataclasses."""
    import mkdocs_hooks  # brings mkdocs

    rows = re.findall(r"^\| `(.*)` \| .* \| (.*) \|$", mkdocs_hooks.settings_tables(), re.M)
    assert {flag for flag, _ in rows} >= {"--batch-size", "--ckpt", "--fast", "RUNS ..."}
    assert not [flag for flag, text in rows if len(text) < 10]


@cache
def known_flags() -> set[str]:
    """Every flag of every command."""
    names = {"--help", "--version", "--config"}
    for _, config in COMMANDS.values():
        module, _, class_name = config.partition(":")
        for field in fields(getattr(importlib.import_module(module), class_name)):
            flag = field.name.replace("_", "-")
            names |= {f"--{flag}", f"--no-{flag}"}
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "benchmarks" and p.name != HISTORY], ids=name)
def test_flags_exist(page):
    """Also those that a sentence names. Flags of tools and of haste_ext.bench are their own."""
    for span in spans(page):
        if not re.match(r"--|haste ", span):
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            assert flag in known_flags() | FLAGS_OF_OTHERS, span


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles_and_calls_what_there_is(page):
    for language, code in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0].startswith("haste"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and public(node):
                assert attribute(node) is not None, ast.unparse(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and public(node.func):
                signature = inspect.signature(attribute(node.func))
                signature.bind(*node.args, **{keyword.arg: keyword for keyword in node.keywords})


def public(node: ast.Attribute) -> bool:
    """Whether an expression such as haste.TrainConfig.from_preset begins with one of the packages."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("haste", "haste_ext")


def attribute(node: ast.expr) -> object:
    """What such an expression names; None where there is no such thing."""
    if isinstance(node, ast.Name):
        return {"haste": haste, "haste_ext": haste_ext}[node.id]
    return getattr(attribute(node.value), node.attr, None)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != HISTORY], ids=name)
def test_files_that_are_named_exist(page):
    for text in [*spans(page), *(block for language, block in blocks(page) if language == "sh")]:
        for path in re.findall(r"(?<![\w/.-])((?:tools|tests|examples|benchmarks|csrc|docs|python)/[\w./-]+)", text):
            assert (ROOT / path.rstrip(".")).exists() or "--output" in text, path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != HISTORY], ids=name)
def test_tests_that_are_named_exist(page):
    """`pytest PATH -k NAME`, and the cells of reliability.md, whose paths are below tests/."""
    for span in spans(page):
        words = shlex.split(span)
        if words and words[0] == "pytest" and words[1] != "PATH":
            path, words = ROOT / words[1], words[1:]
        elif page.name == "reliability.md" and re.match(r"(haste|haste_ext|kernels)/|tools/\S*test_", span):
            path = ROOT / "tests" / words[0]
        else:
            continue
        assert path.exists(), span
        if "-k" in words:
            wanted = [word for word in words[words.index("-k") + 1].split() if word not in ("or", "and", "not")]
            found = "\n".join(names_of_tests(path))
            assert all(word in found for word in wanted), span


def names_of_tests(path: Path) -> list[str]:
    """The names of the tests in a file or folder, and of the files."""
    files = [path] if path.is_file() else sorted(path.rglob("test_*.py"))
    return [line for file in files for line in [file.name, *re.findall(r"^def (test_\w+)", file.read_text(), re.M)]]
