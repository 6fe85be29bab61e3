"""Files of weights: what is read, what is refused, and that no reader in the tree runs what a file holds."""

from __future__ import annotations

import argparse
import ast
import os
import pickle
import sys
import types
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from haste.errors import UserError
from haste.weights import LEGACY, BrokenCheckpoint, load_weights, read_file, settings_in
from overlapping_zip import write_overlapping
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_save_and_safetensors_have_written_is_read(tmp_path, legacy):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        read = load_weights(tmp_path / name, "--weights")
        assert read.keys() == tensors.keys() and all(read[key].equal(value) for key, value in tensors.items())


def test_files_that_are_no_weights_are_refused_by_flag_and_path(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "short.safetensors").write_bytes((2**60).to_bytes(8, "little"))
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", bytes(10_000))
    write_overlapping(tmp_path / "overlapping.pt")
    reasons = {
        "pipe.pt": "is no regular file",
        "nothing.pt": "does not exist",
        "text.pt": "it is no file of torch.save",
        "short.safetensors": "",
        "packed.pt": "its m/data.pkl is compressed",
        "overlapping.pt": "its entries claim to hold more than its size",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"--weights must be .*, got .*{name}, which cannot be read: .*{reason}"):
            load_weights(tmp_path / name, "--weights")


def test_nobody_is_advised_to_let_a_file_do_as_it_likes(tmp_path):
    class Act:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Act()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="it holds more than tensors and plain values: .*open") as caught:
        load_weights(tmp_path / "a.pt", "--weights")
    assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, object]]]:
    """The called names, as they are written, with the keyword arguments that are constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
            yield ast.unparse(node.func), given


def acts(name: str, given: dict[str, object]) -> bool:
    """Whether a call executes what a file holds, or may write where a file says."""
    last = name.rsplit(".", 1)[-1]
    return (
        name in ("eval", "exec", "torch.jit.load", "os.system", "yaml.load", "np.load", "numpy.load")
        or (name == "torch.load" and given.get("weights_only") is not True)
        or (name.startswith(("pickle.", "dill.", "joblib.")) and last in ("load", "loads", "Unpickler"))
        or given.get("allow_pickle", False) is not False
        or given.get("trust_remote_code", False) is not False
        or given.get("shell", False) is not False
        or last in ("extractall", "_Unpickler")
        # from a folder that may bring a program of its own
        or (name in ("AutoConfig.from_pretrained", "AutoModel.from_pretrained") and "trust_remote_code" not in given)
    )


@pytest.mark.parametrize(
    "line",
    ["torch.load(f)", "torch.jit.load(f)", "np.load(f)", "pickle.loads(f)", "eval(f)", "z.extractall()",
     "AutoModel.from_pretrained(f)", "AutoConfig.from_pretrained(f, trust_remote_code=True)", "run(f, shell=True)"],
)  # fmt: skip
def test_calls_that_act_are_known(line):
    assert any(acts(*call) for call in calls(ast.parse(line)))


def test_no_reader_in_the_tree_executes_what_a_file_holds():
    files = [*(ROOT / "python").rglob("*.py"), *(ROOT / "haste_ext").rglob("*.py")]
    assert len(files) > 50
    found = [f"{path}: {call[0]}" for path in files for call in calls(ast.parse(path.read_text())) if acts(*call)]
    assert found == []


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

    with pytest.raises(UserError, match=r"calls posix\.system"):
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
        with pytest.raises(UserError, match="args of it must be named settings, got"):
            settings_in(odd, "args of it")


def test_a_whole_model_and_a_list_are_refused(path):
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(
        UserError, match=r"must hold a dictionary of weights.*, got a torch\.nn\.modules\.linear\.Linear"
    ):
        read_file(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="must hold a dictionary of weights.*, got a list"):
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
    with pytest.raises(BrokenCheckpoint, match=r"sit\.safetensors is not a valid checkpoint"):
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


def test_a_key_that_is_nested_beyond_the_stack_is_refused(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.")
        file.writestr("m/version", "3\n")
    with pytest.raises(UserError, match="it holds more than 100,000 tuples"):
        read_file(path)


def test_what_is_no_checkpoint_is_told_from_what_is_damaged(path, tmp_path):
    for content in (b"", b"hello", pickle.dumps({"model": {}}), b"PK\x03\x04half", bytes(200)):
        path.write_bytes(content)
        with pytest.raises(BrokenCheckpoint, match=r"0000004\.pt is not a valid checkpoint"):
            read_file(path)
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(UserError, match=r"arrays\.npz .* is a zip file, but not of torch\.save") as refusal:
        read_file(tmp_path / "arrays.npz")
    assert not isinstance(refusal.value, BrokenCheckpoint)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(BrokenCheckpoint, match="is no regular file"):
        read_file(tmp_path / "pipe.pt")
