"""Distil a teacher's attention maps into a model of your own: one call in an ordinary training loop.

    python examples/loss_in_your_trainer.py --steps 20

Needs torch and haste_ext alone. The teacher is a frozen random layer here; yours gives its q and k in the same way.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import haste_ext


class Block(nn.Module):
    """A transformer block that also returns its queries and keys (B, H, N, D), as views of its projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2)), q, k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    model, teacher = Block(dim=144, heads=2), Block(dim=128, heads=2).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, teacher_tokens = torch.randn(8, 64, 144), torch.randn(8, 65, 128)  # the teacher's first is a class token
    for step in range(steps):
        prediction, q, k = model(images)
        with torch.no_grad():
            _, teacher_q, teacher_k = teacher(teacher_tokens)
        # "kl" has the gradient of the cross-entropy and reads 0 when the maps agree.
        align = haste_ext.attn_align_loss(q, k, teacher_q, teacher_k, teacher_prefix=1, divergence="kl")
        loss = F.mse_loss(prediction, images) + 0.5 * align
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}, alignment {align.item():.4f}")


if __name__ == "__main__":
    main()
