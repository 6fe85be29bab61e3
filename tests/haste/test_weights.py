"""Files of tensors, and that no reader in the tree executes what a file holds."""

from __future__ import annotations

import ast
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from haste.errors import UserError
from haste.weights import load_weights
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
        "text.pt": "cannot be read",
        "short.safetensors": "cannot be read",
        "packed.pt": "its m/data.pkl is compressed",
        "overlapping.pt": "its entries claim to hold more than its size",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"--weights must be a file of weights, got .*{name}, which .*{reason}"):
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
