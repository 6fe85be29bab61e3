from __future__ import annotations

from pathlib import Path

import pytest
import torch
from haste.errors import UserError
from haste.metrics.inception import (
    Convolution,
    Inception,
    average_pool,
    convolution_names,
    load_inception,
    normalise,
    resize,
)
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the public file is TorchScript


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    return Inception().eval()


@pytest.fixture(scope="module")
def state_file(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


def test_it_has_the_tensors_of_the_public_state_dict(network):
    state = network.state_dict()
    assert len(state) == 94 * 6 + 2  # convolutions with their batch norm, and the last layer
    # The network of the common libraries has 23,834,568 without its second head, and 1,000 classes.
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * (2048 + 1)
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_1a_3x3.bn.running_var": (32,),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7_3.conv.weight": (192, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.bias": (192,),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


@torch.no_grad()
def test_images_of_any_size_give_features_and_probabilities(network):
    sizes = {}
    hooks = [
        getattr(network, name).register_forward_hook(lambda module, x, y, name=name: sizes.update({name: y.shape[1:]}))
        for name in ("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c")
    ]
    features, spatial, probabilities = network(torch.randint(0, 256, (1, 3, 20, 32), dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    assert sizes == {
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7c": (2048, 8, 8),
    }
    assert features.shape == (1, 2048) and probabilities.shape == (1, 1008) and spatial.shape == (1, 2023)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    expected = (features @ network.fc.weight.T).softmax(dim=1)  # the bias has no part in it
    assert torch.allclose(probabilities, expected)


@torch.no_grad()
def test_spatial_features_are_adms(network):
    """Seven channels of mixed_6/conv after its ReLU, (17, 17, 7) as TensorFlow flattens it."""
    assert convolution_names()["layers.mixed_6.conv"] == "Mixed_6d.branch1x1"
    seen = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: seen.append(y))
    spatial = network(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))[1]
    hook.remove()
    assert seen[0].shape == (2, 192, 17, 17) and (seen[0] >= 0).all()
    for image, row, column, channel in ((0, 0, 0, 0), (1, 3, 16, 6), (0, 16, 0, 2)):
        assert spatial[image, (row * 17 + column) * 7 + channel] == seen[0][image, channel, row, column]


def test_where_it_differs_from_the_common_network(network):
    assert average_pool(torch.ones(1, 1, 4, 4)).eq(1).all()  # padding that counted would darken the border
    assert all(m.eps == 0.001 for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert network.Mixed_7b.pool == "average" and network.Mixed_7c.pool == "maximum"


def test_resizing_is_tensorflow_ones():
    """Pixel i of the result looks at i·old/new and never beyond the last pixel."""
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize(ramp, 8)[0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert resize(ramp.mT, 8)[0, 0, :, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert resize(ramp, 2)[0, 0, 0].tolist() == [0.0, 2.0]  # nothing is smoothed
    image = torch.rand(2, 3, 299, 299)
    assert resize(image).equal(image)


@torch.no_grad()
def test_images_are_resized_as_in_pytorch_fid(network, monkeypatch):
    """Half-pixel centres and −1 to 1, for the reference statistics of U-ViT."""
    seen = []
    monkeypatch.setattr(network, "features", lambda x: seen.append(x) or (torch.zeros(len(x), 2048), None))
    images = torch.randint(0, 256, (2, 3, 20, 32), dtype=torch.uint8)
    network(images, "pytorch-fid")
    network(images)
    inside = nn.functional.interpolate(images / 255.0, (299, 299), mode="bilinear", align_corners=False)
    assert torch.allclose(seen[0], 2 * inside - 1, atol=1e-6) and seen[1].equal(normalise(resize(images.float())))
    assert (seen[0] - seen[1]).abs().max() > 0.05


def test_pixels_become_minus_one_to_one():
    assert normalise(torch.tensor([0.0, 128.0, 255.0])).tolist() == [-1.0, 0.0, 127 / 128]


@torch.no_grad()
def test_a_state_dict_is_loaded_with_and_without_the_counts_of_batches(network, state_file, tmp_path):
    old = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(old, tmp_path / "old.pth")
    x = torch.rand(1, 3, 80, 80)
    for path in (state_file, tmp_path / "old.pth"):
        loaded = load_inception(path)
        assert not loaded.training
        assert loaded.Conv2d_2b_3x3(loaded.Conv2d_2a_3x3(loaded.Conv2d_1a_3x3(x))).equal(
            network.Conv2d_2b_3x3(network.Conv2d_2a_3x3(network.Conv2d_1a_3x3(x)))
        )
        assert all(loaded.state_dict()[name].equal(value) for name, value in old.items())


class Part(nn.Module):
    """A module with attributes alone."""


def scripted(network: Inception, path: Path) -> Path:
    """The network as the public TorchScript module has it: its names, and batch norms without scale."""
    root, state = Part(), network.state_dict()
    for theirs, ours in convolution_names().items():
        part = root
        for name in theirs.split("."):
            if not hasattr(part, name):
                part.add_module(name, Part())
            part = getattr(part, name)
        part.weight = nn.Parameter(state[f"{ours}.conv.weight"])
        for name, own in (("beta", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            part.register_buffer(name, state[f"{ours}.bn.{own}"])
    root.output = nn.Linear(2048, 1008)
    root.output.load_state_dict(network.fc.state_dict())
    torch.jit.script(root).save(path)
    return path


def test_each_convolution_of_the_torchscript_module_has_its_place(network):
    names = convolution_names()
    convolutions = {name for name, module in network.named_modules() if isinstance(module, Convolution)}
    assert len(names) == 94 and set(names.values()) == convolutions
    expected = {
        "layers.conv": "Conv2d_1a_3x3",
        "layers.conv_4": "Conv2d_4a_3x3",
        "layers.mixed.tower.conv_1": "Mixed_5b.branch5x5_2",
        "layers.mixed_2.tower_2.conv": "Mixed_5d.branch_pool",
        "layers.mixed_3.conv": "Mixed_6a.branch3x3",
        "layers.mixed_4.tower_1.conv_4": "Mixed_6b.branch7x7dbl_5",
        "layers.mixed_8.tower.conv_1": "Mixed_7a.branch3x3_2",
        "layers.mixed_9.tower_conv": "Mixed_7b.branch3x3_1",
        "layers.mixed_9.tower_mixed_conv_1": "Mixed_7b.branch3x3_2b",
        "layers.mixed_10.tower_1_mixed_conv": "Mixed_7c.branch3x3dbl_3a",
    }
    assert {name: names[name] for name in expected} == expected


def test_of_a_torchscript_module_the_weights_are_read(network, tmp_path):
    loaded = load_inception(scripted(network, tmp_path / "inception-2015-12-05.pt"))
    assert type(loaded) is Inception and not loaded.training
    state = loaded.state_dict()
    for name, value in network.state_dict().items():
        assert state[name].equal(value), name


def test_a_state_dict_in_safetensors_is_loaded(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    state = load_inception(tmp_path / "inception.safetensors").state_dict()
    assert all(state[name].equal(value) for name, value in network.state_dict().items())


class Unpickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_files_that_are_no_inception_are_refused(network, tmp_path):
    with pytest.raises(UserError, match="--features inception must be .*nowhere.pth, which is no file"):
        load_inception(tmp_path / "nowhere.pth")
    state = dict(network.state_dict())
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "classes.pth")
    torch.save({**state, "AuxLogits.fc.bias": torch.zeros(1000)}, tmp_path / "head.pth")
    del state["Mixed_7c.branch1x1.bn.weight"]
    torch.save(state, tmp_path / "lacking.pth")
    for name in ("classes", "head", "lacking"):
        with pytest.raises(UserError, match="--features inception must be"):
            load_inception(tmp_path / f"{name}.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="--features inception must be .*holds a Tensor"):
        load_inception(tmp_path / "tensor.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="--features inception must be a file of weights"):
        load_inception(tmp_path / "text.pth")
    torch.jit.script(nn.Linear(2, 3)).save(tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="--features inception must be .*foreign.pt"):
        load_inception(tmp_path / "foreign.pt")


def test_no_code_of_a_pickle_runs(tmp_path):
    torch.save({"fc.weight": Unpickled(str(tmp_path / "ran"))}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="--features inception must be a file of weights"):
        load_inception(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
