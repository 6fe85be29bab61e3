"""Archives as torch.jit writes them, honest and hostile ones."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from haste.errors import UserError
from haste.weights import load_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Network(nn.Module):
    """Parameters and buffers of several types, some of them views, beside attributes of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 3, (1, 5)), nn.BatchNorm2d(3))
        self.wide = nn.Parameter(torch.randn(4, 3).half().T)
        self.tied = self.inner[0].weight
        self.register_buffer("view", torch.arange(12.0).view(3, 4)[1:, ::2])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.empty(0, 2))
        self.name, self.sizes = "network", [1, 2, 3]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Overwriting(nn.Module):
    """Writes over a file when it is loaded, by way of torch.from_file."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor, bool]:
        return self.target, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor, bool]) -> None:
        self.target, self.weight, self.training = state[0], state[1], state[2]
        self.weight = torch.from_file(self.target, shared=True, size=4, dtype=torch.float32).fill_(7.0)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_tensors_are_those_of_the_state_dict(tmp_path):
    network = Network()
    torch.jit.script(network).save(tmp_path / "a.pt")
    read, expected = load_weights(tmp_path / "a.pt", "--features"), network.state_dict()
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype and read[name].equal(value), name


def test_the_program_of_an_archive_does_not_run(tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(bytes(16))
    torch.jit.script(Overwriting(str(target))).save(tmp_path / "a.pt")
    torch.jit.load(tmp_path / "a.pt")
    assert target.read_bytes() != bytes(16)  # what torch does
    target.write_bytes(bytes(16))
    with pytest.raises(UserError, match="it holds no tensors"):  # none that its program does not put in place
        load_weights(tmp_path / "a.pt", "--features")
    assert target.read_bytes() == bytes(16)


def archive(path: Path, data: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in {"data.pkl": data, "constants.pkl": b"", "code/a.py": b"", "data/0": bytes(16)}.items():
            file.writestr(f"m/{name}", content)
    return path


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, key: str = "0") -> bytes:
    """The pickle of a module with one float tensor."""

    class Writer(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, key, "cpu", 4) if item is Writer else None

    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Writer, offset, size, stride, False, {})

    file = io.BytesIO()
    Writer(file, 2).dump({"a": Rebuilt()})
    pickled = file.getvalue()[2:-1]
    return b"\x80\x02c__torch__\nM\n)\x81" + pickled + b"b."


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((2**40,), (0,), 0), ((4,), (1,), 1), ((2, 2), (3, 1), 0), ((-1,), (1,), 0), ((1.0,), (1,), 0), ((1, 1), (1,), 0)],
)
def test_a_tensor_that_is_larger_than_its_bytes_is_refused(tmp_path, size, stride, offset):
    whole = load_weights(archive(tmp_path / "a.pt", tensor((2, 2), (2, 1))), "--features")
    assert whole["a"].equal(torch.zeros(2, 2))
    path = archive(tmp_path / "b.pt", tensor(size, stride, offset))
    with pytest.raises(UserError, match="--features must be a file of weights, got .*b.pt, which cannot be read"):
        load_weights(path, "--features")


def test_what_torch_does_not_write_is_refused(tmp_path):
    class Act:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    nested = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."
    files = {"act": pickle.dumps(Act(), 2), "nested": nested, "none": b"", "old": pickle.dumps([1], 0)}
    for name, data in files.items():
        with pytest.raises(UserError, match="must be a file of weights, got .* which cannot be read"):
            load_weights(archive(tmp_path / f"{name}.pt", data), "--features")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="is compressed"):
        load_weights(archive(tmp_path / "packed.pt", tensor((1,), (1,)), zipfile.ZIP_DEFLATED), "--features")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=30), st.integers(0, 200))
def test_any_bytes_in_the_pickle_are_tensors_or_a_refusal(tmp_path_factory, data, where):
    whole = tensor((2, 2), (2, 1))
    changed = whole[:where] + data + whole[where + len(data) :]
    path = archive(tmp_path_factory.getbasetemp() / "any.pt", changed)
    try:
        load_weights(path, "--features")
    except UserError as error:
        assert "any.pt, which cannot be read" in str(error)
