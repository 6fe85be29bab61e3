import pytest
import torch
from haste.models import SiT, get_family
from haste.training import logging
from haste.training.logging import peak_teraflops
from torch.utils.flop_counter import FlopCounterMode

SHAPE = {"input_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 3, "num_heads": 4}


def test_operations_are_those_that_torch_counts():
    model = SiT(**SHAPE, num_classes=10, fused_attn=False).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([1, 2])).velocity.sum().backward()
    # The time embedding and the last adaLN are left out, and images need no gradient.
    assert get_family("sit").training_flops(SHAPE) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


def test_the_peak_is_known_by_the_devices_name(monkeypatch):
    monkeypatch.setattr(logging.torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_teraflops(torch.device("cuda"), "bf16") == 989
    assert peak_teraflops(torch.device("cuda"), "no") is None
    assert peak_teraflops(torch.device("cpu"), "bf16") is None
