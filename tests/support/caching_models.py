"""Small models for the tests of caching."""

from __future__ import annotations

from typing import Any

import torch
from haste.models import DiT, MMDiT, SiT
from haste.samplers import initial_noise


def small_sit(depth: int = 2, input_size: int = 8) -> SiT:
    """With weights that make every block matter, and gates that differ from time to time."""
    torch.manual_seed(0)
    model = SiT(
        input_size=input_size, patch_size=2, in_channels=1, hidden_size=32, depth=depth, num_heads=4, num_classes=10
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def small_dit(depth: int = 2, **parts: Any) -> DiT:
    """The same of noise and variance, of 4 channels; its predictions hardly leave [-2, 2], as trained ones."""
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, hidden_size=32, depth=depth, num_heads=4, num_classes=10, **parts)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def small_noise(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (batch, 1, 8, 8) and labels (batch,)."""
    return initial_noise((batch, 1, 8, 8), torch.Generator().manual_seed(1), dtype=dtype), torch.arange(batch)


def small_mmdit(depth: int = 2) -> MMDiT:
    """The same of two streams; its texts have 3 tokens of width 12."""
    torch.manual_seed(0)
    model = MMDiT(
        input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=depth, num_heads=4, context_tokens=3,
        context_width=12,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def small_text(batch: int = 2, tokens: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Features of texts (batch, tokens, 12)."""
    return torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
