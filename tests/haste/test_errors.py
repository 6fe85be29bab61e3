"""A package of an extra that is not installed is named with the extra; one that is there is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from haste.errors import EXTRAS, PACKAGES, UserError, require

ROOT = Path(__file__).resolve().parents[2]


def test_a_module_that_is_there_is_imported():
    assert require("os.path") is os.path


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_of_a_missing_package_is_named_and_has_it(module):
    code = f"from haste.errors import require; require({module!r})"
    folders = [ROOT / "tests/support/absent_packages", ROOT / "python"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "ABSENT_PACKAGES": module}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    package, extra = PACKAGES.get(module, module), EXTRAS[module]
    assert f"the package {package} is not installed: run `pip install 'haste[{extra}]'`" in result.stderr
    (line,) = re.findall(rf"^{extra} = .*", (ROOT / "pyproject.toml").read_text(), re.M)
    assert f'"{package}"' in line


def test_what_a_package_lacks_itself_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "matplotlib_like.py").write_text("import nonsense_of_its_own")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nonsense_of_its_own") as error:
        require("matplotlib_like")
    assert not isinstance(error.value, UserError)
