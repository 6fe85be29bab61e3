"""The emulation itself: it computes what a GPU would, and stops or spoils what a GPU would let pass."""

from __future__ import annotations

import pytest
import torch


def run(emulator, name, seed=0):
    source, target = torch.arange(64, dtype=torch.float32), torch.zeros(64)
    return emulator("fault", {"source": source, "target": target}, ("target",), seed, name=name)["target"]


def test_kernels_without_a_fault(emulator):
    numbers = torch.arange(64, dtype=torch.float32)
    for seed in range(5):
        assert torch.equal(run(emulator, "none", seed), numbers.flip(0))
        assert torch.equal(run(emulator, "waited_copy", seed), numbers)
        assert torch.equal(run(emulator, "exchange", seed), numbers.view(32, 2).flip(1).flatten())


def test_a_missing_barrier_shows_as_nan(emulator):
    assert run(emulator, "no_barrier").isnan().any()


def test_a_missing_wait_shows_as_nan(emulator):
    assert run(emulator, "no_wait").isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("past_the_end", "heap-buffer-overflow"),
        ("divergent_warp", "lanes of one warp meet in different operations"),
        ("barrier_for_some", "the block is stuck"),
    ),
)
def test_a_fault_ends_the_process(emulator, name, message):
    with pytest.raises(emulator.KernelFault, match=message):
        run(emulator, name)


def test_conversions_are_those_of_torch(emulator):
    """Every half and bfloat16 and its neighbourhood: halfway cases, subnormals, overflow, infinities, NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = torch.cat([every.view(torch.float16).float(), every.view(torch.bfloat16).float()])
    values = torch.cat([values, values * (1 + 2**-12), values * (1 + 2**-9), values * (1 + 2**-8 + 2**-20)])
    types = {"half": torch.float16, "bfloat16": torch.bfloat16}
    buffers = {"source": values}
    for name, dtype in types.items():
        buffers |= {name: torch.zeros_like(values, dtype=dtype), f"from_{name}": torch.zeros_like(values)}
    returned = tuple(name for name in buffers if name != "source")
    results = emulator("convert", buffers, returned, count=values.numel())
    for name, dtype in types.items():
        expected = values.to(dtype)
        torch.testing.assert_close(results[name], expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(results[f"from_{name}"], expected.float(), rtol=0, atol=0, equal_nan=True)
