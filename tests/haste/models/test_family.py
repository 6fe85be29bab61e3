"""The registry of model families, and families of other installed packages."""

from __future__ import annotations

import logging
import sys

import pytest
from haste.cli.main import main
from haste.errors import UserError
from haste.models import build_model, find_size, get_family, registry

MODULE = """
from haste.models.sit_family import SiTFamily

class Tiny(SiTFamily):
    name = "tiny-of-another-package"
    title = "Tiny"
    sizes = {"Tiny-S/2": {"depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 2}}
"""


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Another package on the path, whose metadata declares a family: as it would be installed."""

    def install(value: str, module: str = MODULE) -> None:
        (tmp_path / "another_package.py").write_text(module)
        info = tmp_path / "another_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: another-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[haste.families]\ntiny = {value}\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.load_entry_points.cache_clear()
    yield install
    registry.load_entry_points.cache_clear()
    sys.modules.pop("another_package", None)


def test_a_family_of_another_package_is_found_by_the_name_of_a_size_and_by_its_own(distribution):
    distribution("another_package:Tiny")
    get_family("sit")
    assert "another_package" not in sys.modules  # only where haste has no such name
    found, size = find_size("Tiny-S/2")
    assert found.name == "tiny-of-another-package" and size["depth"] == 1
    registry._FAMILIES.pop(found.name)
    registry.load_entry_points.cache_clear()
    assert get_family({"family": "tiny-of-another-package"}).title == "Tiny"


def test_the_command_trains_it_and_samples_from_it(distribution, tmp_path, capsys):
    distribution("another_package:Tiny")
    run = ["--output-dir", str(tmp_path), "--exp-name", "run", "--data-dir", "digits", "--resolution", "8"]
    plain = ["--enc-type", "None", "--attn-coeff", "0", "--proj-coeff", "0", "--mixed-precision", "no"]
    main(["train", *run, *plain, "--model", "Tiny-S/2", "--max-train-steps", "1", "--batch-size", "4"])
    main(["sample", "--ckpt", str(tmp_path / "run"), "--num-fid-samples", "2", "--num-steps", "2"])
    assert "2 images at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "module"),
    [("another_package:Tiny", "raise RuntimeError('broken')"), ("another_package:nothing", ""),
     ("another_package:Tiny", "Tiny = 3")],
)  # fmt: skip
def test_one_that_cannot_be_imported_is_warned_of_and_the_name_refused(distribution, value, module, caplog):
    distribution(value, module)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="--model must be one of .*SiT-"):
        find_size("Tiny-S/2")
    assert f"the model family tiny = {value} is left out: " in caplog.text


@pytest.mark.parametrize("name", ["nothing", 3])
def test_an_unknown_family_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"family must be one of .*sit.*, got '{name}'"):
        build_model({"family": name})
