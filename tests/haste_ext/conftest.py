"""Every test that takes `device` runs on the CPU, and on the GPU where there is one and the build holds its kernels."""

from __future__ import annotations

import pytest
import torch

import haste_ext

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and haste_ext.build_info()["cuda"] else [])


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """The accuracy rule compares two largest errors: a rare sample on which eager is lucky must not fail a build."""
    torch.manual_seed(0)
