"""The order of the packages: imports point down only, also those inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import haste
import pytest

PACKAGE = Path(haste.__file__).parent

# From the top down; what stands in one line may import each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"sweep", "report"},
    {"evaluation", "digits"},
    {"generation"},
    {"training"},
    {"alignment", "caching", "metrics"},
    {"teachers", "data", "distributed", "plotting"},
    {"models", "vae", "text"},
    {"samplers", "transport", "diffusion", "cuda_graphs", "weights", "validation", "tables", "registry", "torchscript"},
    {"resumable"},
    {"io", "errors", "_compat"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names of all modules that a file imports, those for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            if node.module == "haste":
                yield from (f"haste.{alias.name}" for alias in node.names)
        yield from imported(node)


def part(path: Path) -> str:
    """The package, or the module beside them, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part(path)
    assert own in LAYER, f"{own} has no place in LAYERS"
    for name in imported(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top != "haste" or other == own or other not in LAYER:  # a name of haste's own, such as __version__
            continue
        assert LAYER[own] <= LAYER[other], f"{own} imports {name}, which is above it"
        assert other != "digits", f"{own} imports the plug-in {name}; haste.registry names it"


def test_haste_ext_knows_nothing_of_haste():
    import haste_ext

    for path in Path(haste_ext.__file__).parent.rglob("*.py"):
        assert not [name for name in imported(ast.parse(path.read_text())) if name.partition(".")[0] == "haste"], path


def private_uses(tree: ast.AST) -> Iterator[str]:
    """What a file uses of torch and transformers that is private: names, attributes and arguments with an underscore in
    front, and modules of transformers that its documentation does not list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            yield from [node.module] * (node.module != "transformers.utils.logging")
        if isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
            yield node.arg
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "torch":
            yield from (f"{node.module}.{a.name}" for a in node.names if f".{node.module}.{a.name}".count("._"))
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and (chain.startswith("torch.") or node.attr in ("_version", "_typed_storage")):
                yield chain


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_parts_of_torch_and_transformers_are_used_in_one_file(path):
    if path.name != "_compat.py":
        assert not list(private_uses(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._foreach_add_(a, b)",
        "from torch._C import x",
        "from torch.optim import _f",
        "t._version",
        "from transformers.masking_utils import sdpa_mask",
        "f(_raise_exceptions=False)",
    ],  # fmt: skip
)
def test_private_uses_are_seen(source):
    assert list(private_uses(ast.parse(source)))


def test_imports_inside_functions_are_seen():
    source = "def f():\n    from haste.cli import main\n    import haste.report"
    assert list(imported(ast.parse(source))) == ["haste.cli", "haste.report"]
