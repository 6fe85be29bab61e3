"""What a step costs and what of it a device could do: operations, share of the peak, memory."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

import torch

# Dense 16-bit matrix products per second, in units of 10^12, from NVIDIA's data sheets; the first name that fits.
PEAK_TERAFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165,
}  # fmt: skip


def training_flops(model_config: Mapping[str, Any]) -> int:
    """Operations of the student's matrix products per picture: forward, and twice that for backward.

    The teacher's and the alignment's are not counted, so that a step's utilisation means the same before and after τ.
    """
    width, patch = model_config["hidden_size"], model_config["patch_size"]
    tokens = (model_config["input_size"] // patch) ** 2
    patch_values = patch * patch * model_config["in_channels"]
    block = tokens * 12 * width * width + 2 * tokens * tokens * width + 6 * width * width
    ends = 2 * tokens * patch_values * width
    return 3 * 2 * (model_config["depth"] * block + ends)


def peak_teraflops(device: torch.device, precision: str) -> float | None:
    """Of one device; None where it is not known, or where products are not 16-bit."""
    if device.type != "cuda" or precision == "no":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TERAFLOPS.items() if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held at any time: on its GPU, or else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # which Linux counts in KiB
