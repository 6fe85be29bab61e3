from __future__ import annotations

import re
from pathlib import Path

import haste
import pytest
from haste import registry
from haste.registry import plugin

PACKAGE = Path(haste.__file__).parent
TABLES = {"DATASETS", "TEACHERS", "EXTRACTORS"}


@pytest.mark.parametrize("table", sorted(TABLES))
def test_every_name_is_there(table):
    for name in getattr(registry, table):
        assert plugin(getattr(registry, table), name) is not None


def test_a_data_set_has_the_size_that_its_samples_are_known_by():
    for name, side in registry.IMAGE_SIZES.items():
        images, labels = plugin(registry.DATASETS, name)()
        assert images.shape[-2:] == (side, side) and len(images) == len(labels)


def test_nobody_imports_a_plugin():
    targets = {target.partition(":")[0] for table in TABLES for target in getattr(registry, table).values()}
    roots = {".".join(target.split(".")[:2]) for target in targets}
    for root in roots:
        own = PACKAGE.joinpath(*root.split(".")[1:])
        statement = re.compile(rf"^\s*(from|import) {re.escape(root)}\b", re.MULTILINE)
        importers = [
            path for path in PACKAGE.rglob("*.py") if own not in path.parents and statement.search(path.read_text())
        ]
        assert importers == []
