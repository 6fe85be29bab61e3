"""Files of weights: nothing in them runs, plain values of other libraries become plain, what is refused is named."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
import zipfile
from collections import Counter, defaultdict, deque
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from haste.errors import UserError
from haste.weights import LEGACY, BrokenCheckpoint, read_file, settings_in
from overlapping_zip import write_overlapping
from safetensors.torch import save_file

WEIGHTS = {"a.weight": torch.arange(4.0)}


def saved(path: Path, args, **options) -> Path:
    torch.save({"model": WEIGHTS, "args": args}, path, **options)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "0000004.pt"


class Opens:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


class Other:
    def __init__(self, **values) -> None:
        self.__dict__.update(values)


def test_nothing_runs(path, tmp_path):
    assert repr(read_file(saved(path, Opens(tmp_path / "ran")))["args"]) == "a io.open"
    with pytest.raises(UserError, match=r"holds a io\.open"):
        read_file(saved(path, Opens(tmp_path / "ran"), _use_new_zipfile_serialization=False))
    assert not (tmp_path / "ran").exists()


def test_a_call_of_the_system_is_named(path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch ran",))

    with pytest.raises(UserError, match=r"wants to call posix\.system"):
        read_file(saved(path, Evil()))


def test_plain_values_of_other_libraries_become_plain(path):
    args = argparse.Namespace(
        data_dir=PurePosixPath("/data/imagenet"),
        other=PureWindowsPath("runs/x"),
        lr=np.float64(1e-4),
        steps=np.int32(400),
        flag=np.bool_(True),
        name=np.str_("né"),
        nested={"paths": [Path("a")], "pair": (np.float32(0.5), None)},
        by_class=defaultdict(list),
        last=deque([1, 2]),
        counts=Counter("aab"),
        group=argparse.Namespace(seed=np.int64(3)),
    )
    assert vars(read_file(saved(path, args))["args"]) == {
        "data_dir": "/data/imagenet", "other": "runs/x", "lr": 1e-4, "steps": 400, "flag": True, "name": "né",
        "nested": {"paths": ["a"], "pair": (0.5, None)}, "by_class": {},
        "last": [1, 2], "counts": {"a": 2, "b": 1}, "group": argparse.Namespace(seed=3),
    }  # fmt: skip


def omegaconf(**values) -> tuple[types.ModuleType, object]:
    """A DictConfig as OmegaConf pickles it: nodes with a value, which know their parent; a list within."""
    module = types.ModuleType("omegaconf")
    for name in ("DictConfig", "ListConfig", "AnyNode", "ContainerMetadata"):
        setattr(module, name, type(name, (), {"__module__": "omegaconf"}))

    def made(kind: str, **state):
        new = getattr(module, kind)()
        new.__dict__.update(state)
        return new

    config = made("DictConfig", _metadata=made("ContainerMetadata", object_type=dict, resolver=defaultdict(dict)))
    config._content = {name: made("AnyNode", _val=value, _parent=config) for name, value in values.items()}
    config._content["sizes"] = made("ListConfig", _content=[made("AnyNode", _val=n) for n in (1, 2)], _parent=config)
    return module, config


def test_omegaconfs_settings_are_plain_ones(path, monkeypatch):
    module, config = omegaconf(seed=3, path_type="linear")
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    saved(path, config)
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert settings_in(read_file(path)["args"], "args") == {"seed": 3, "path_type": "linear", "sizes": [1, 2]}


def test_an_object_of_any_class_gives_its_attributes_as_settings(path):
    for args in (Other(seed=3), SimpleNamespace(seed=3), argparse.Namespace(seed=3), {"seed": 3}):
        assert settings_in(read_file(saved(path, args))["args"], "args") == {"seed": 3}
    assert settings_in(None, "args") == {}
    for odd in ([1], "text", 3):
        with pytest.raises(UserError, match="args of it must hold named settings, and is"):
            settings_in(odd, "args of it")


def test_a_whole_model_and_a_list_are_refused(path):
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"holds a torch\.nn\.modules\.linear\.Linear as a whole"):
        read_file(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="must hold a dictionary of weights, and holds list"):
        read_file(path)


def test_files_of_torch_before_1_6(path):
    saved(path, argparse.Namespace(seed=3), _use_new_zipfile_serialization=False)
    assert path.read_bytes().startswith(LEGACY)
    content = read_file(path)
    assert content["args"].seed == 3 and torch.equal(content["model"]["a.weight"], WEIGHTS["a.weight"])
    saved(path, Other(seed=3), _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"holds a \S*Other, which is not read from files of torch before 1\.6"):
        read_file(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError):
        read_file(path)


def test_safetensors_with_their_metadata(tmp_path):
    path = tmp_path / "sit.safetensors"
    save_file(WEIGHTS, path, {"format": "pt", "path_type": "linear", "num_classes": "1000"})
    content = read_file(path)
    assert torch.equal(content["ema"]["a.weight"], WEIGHTS["a.weight"])
    assert vars(content["args"]) == {"path_type": "linear", "num_classes": 1000}
    save_file(WEIGHTS, path)
    assert read_file(path).keys() == {"ema"}
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BrokenCheckpoint, match=r"sit\.safetensors is no whole checkpoint"):
        read_file(path)


def test_an_archive_that_fills_more_memory_than_its_size_is_refused(path, tmp_path):
    saved(path, None)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(UserError, match=r"packed\.pt cannot be read as a checkpoint: its .* is compressed"):
        read_file(packed)
    overlapping = write_overlapping(tmp_path / "overlapping.pt")
    with pytest.raises(UserError, match=r"overlapping\.pt .* claim to hold more than its size"):
        read_file(overlapping)


def test_what_is_no_checkpoint_is_told_from_what_is_damaged(path, tmp_path):
    for content in (b"", b"hello", pickle.dumps({"model": {}}), b"PK\x03\x04half", bytes(200)):
        path.write_bytes(content)
        with pytest.raises(BrokenCheckpoint, match=r"0000004\.pt is no whole checkpoint"):
            read_file(path)
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(UserError, match=r"arrays\.npz .* is a zip file that torch\.save has not written") as refusal:
        read_file(tmp_path / "arrays.npz")
    assert not isinstance(refusal.value, BrokenCheckpoint)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(BrokenCheckpoint, match="it is no file"):
        read_file(tmp_path / "pipe.pt")
