"""On PYTHONPATH it makes the packages named in ABSENT_PACKAGES look as if they were not installed."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

ABSENT = set(os.environ.get("ABSENT_PACKAGES", "").split())


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
