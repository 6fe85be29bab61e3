"""What a user reads when the binary and the device do not fit together; the device and its answers are emulated."""

from __future__ import annotations

import pytest

# cudaError_t, as in CUDA's driver_types.h
SUCCESS, INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE = 0, 35, 209


def ask(emulator, capability, load_error):
    major, minor = capability
    emulator("device_problem", {}, name="NVIDIA Test", major=major, minor=minor, load_error=load_error)


def test_a_device_that_fits(emulator):
    ask(emulator, (9, 0), SUCCESS)


def test_a_device_without_machine_code(emulator):
    with pytest.raises(emulator.Refused) as problem:
        ask(emulator, (8, 6), NO_KERNEL_IMAGE)
    assert str(problem.value) == (
        "NVIDIA Test (CUDA device 0) has compute capability 8.6, and this build of haste_ext holds machine code for "
        '80, 90, 120, 120+PTX; in its source folder run: TORCH_CUDA_ARCH_LIST="8.6" '
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    )


def test_a_device_that_is_too_old(emulator):
    with pytest.raises(emulator.Refused) as problem:
        ask(emulator, (7, 5), NO_KERNEL_IMAGE)
    assert str(problem.value) == (
        "NVIDIA Test (CUDA device 0) has compute capability 7.5; the kernels of haste_ext need 8.0 or newer"
    )


def test_a_driver_that_is_too_old(emulator):
    with pytest.raises(emulator.Refused) as problem:
        ask(emulator, (9, 0), INSUFFICIENT_DRIVER)
    assert str(problem.value) == (
        "haste_ext was built with CUDA 13.0 and cannot use CUDA device 0: "
        "CUDA driver version is insufficient for CUDA runtime version"
    )
