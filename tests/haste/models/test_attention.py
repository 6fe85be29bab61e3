"""Every backend of the student's attention computes the same; packages that are absent are named."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from haste.errors import UserError
from haste.models import SiT
from haste.models.layers import BACKENDS, check_backend


def tokens_first(q, k, v):
    """As flash-attn and xformers take and give them: (B, N, H, D)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the two packages, with their signatures and layout."""
    flash, xformers, ops = ModuleType("flash_attn"), ModuleType("xformers"), ModuleType("xformers.ops")
    flash.flash_attn_func = ops.memory_efficient_attention = tokens_first
    for module in (flash, xformers, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_agrees_with_the_definition(backend, packages):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    expected = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(BACKENDS[backend](q, k, v), expected)


def test_the_student_runs_on_the_backend_that_was_asked_for(packages, monkeypatch):
    calls = []
    counted = lambda *qkv: calls.append(1) or tokens_first(*qkv)  # noqa: E731
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", counted)
    shape = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = SiT(**shape, attention="flash-attn").eval()
    model(torch.randn(1, 4, 4, 4), torch.rand(1), torch.tensor([1]))
    assert len(calls) == 2


@pytest.mark.parametrize(("name", "package"), [("flash-attn", "flash_attn"), ("xformers", "xformers")])
def test_a_package_that_is_not_installed_is_named(name, package, monkeypatch):
    monkeypatch.setattr("haste.models.layers.importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"--attention is {name}, and the package {package} is not installed"):
        check_backend(name)
    check_backend("sdpa")


@pytest.mark.parametrize("aligned", [(), (1, 0)])
def test_the_student_compiles_without_a_graph_break(aligned):
    torch._dynamo.reset()
    shape = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "encoder_depth": 1}
    model = SiT(**shape, z_dims=(6,), projector_dim=8).eval()
    inputs = (torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 2]), aligned, bool(aligned))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, model(*inputs))
