"""The baseline: xAR's sampling loop as it is published (arXiv 2502.20388 and its code), written anew.

Both halves of the guidance in every evaluation, also for the first cell, whose guidance is 1; the keys and values of
finished cells concatenated in every layer of every evaluation; a mask in a cell's first evaluation, which is given the
cell before it as well; every block's modulation computed in every evaluation and repeated over the cell's tokens; the
state in double precision, times built on the host. Where the public code has a choice, it gets the faster one here:
torch's fused attention, and no autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from haste.models import XAR
from haste.models.xar import XARBlock
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


class PublishedSampler:
    """Samples cell by cell.

    evaluations: of the network so far. cache_bytes: keys and values at the end of a run.
    """

    def __init__(self, model: XAR) -> None:
        self.model = model
        self.tokens = model.entities.causal  # of a cell
        cos, sin = model.rotary(model.dtype, "cpu")
        self.cos, self.sin = (table.repeat_interleave(2, dim=1).to(model.dtype) for table in (cos, sin))
        self.mask = torch.zeros(model.entities.visible.shape).masked_fill(~model.entities.visible, -torch.inf)
        self.mask = self.mask.to(model.dtype)
        self.evaluations = 0
        self.cache_bytes = 0

    @torch.no_grad()
    def __call__(
        self, noise: Sequence[Tensor], step_noise: Iterator[Tensor] | None, labels: Tensor, num_steps: int, cfg: float
    ) -> Tensor:
        """Euler–Maruyama, or with no step noise Euler's method for the ODE.

        Args:
            noise: of each cell (B, n, values).
            step_noise: of the first cell's steps, then of the second's, and so on.
            labels: (B,).

        Returns:
            (B, cells · n, values), in the type of noise.
        """
        y = torch.cat([labels, torch.full_like(labels, self.model.num_classes)])
        last = 0.04 if step_noise is not None else 0.0
        times = torch.linspace(1, last, num_steps + (step_noise is None), dtype=torch.float64)
        if step_noise is not None:
            times = torch.cat([times, times.new_zeros(1)])
        self.cache: list[KeysValues | None] = [None] * len(self.model.blocks)
        done: list[Tensor] = []
        for cell, first in enumerate(noise):
            x = first.double()
            w = 1 + (cfg - 1) * cell / (len(noise) - 1)
            for step in range(num_steps):
                t, after = times[step], times[step + 1]
                v = self.velocity(x, t, y, w, cell, done[-1] if cell and step == 0 else None)
                if step_noise is None:
                    x = x + v * (after - t)
                    continue
                x = x + ((2 - t) * v + x) * (after - t)
                if step < num_steps - 1:
                    x = x + torch.sqrt(2 * t) * torch.sqrt(t - after) * next(step_noise).double()
            done.append(x.to(first.dtype))
        self.cache_bytes = sum(x.numel() * x.element_size() for kv in self.cache if kv is not None for x in kv)
        return torch.cat(done, dim=1)

    def velocity(self, x: Tensor, t: Tensor, y: Tensor, w: float, cell: int, previous: Tensor | None) -> Tensor:
        """Guided, (B, n, values), float64. previous: the finished cell before, in a cell's first evaluation."""
        self.evaluations += 1
        rows = torch.cat([x, x]).to(self.model.dtype)
        times = torch.full((len(rows), 1), t.item())
        begin = cell * self.tokens
        if previous is not None:
            rows = torch.cat([torch.cat([previous, previous]).to(rows), rows], dim=1)
            times = torch.cat([torch.zeros_like(times), times], dim=1)
            begin -= self.tokens
        v = self.forward(rows, times, y, begin, previous is not None)[:, -self.tokens :]
        v_cond, v_null = v.double().chunk(2)
        return v_null + w * (v_cond - v_null) if w > 1 else v_cond

    def forward(self, tokens: Tensor, t: Tensor, y: Tensor, begin: int, extend: bool) -> Tensor:
        """Velocities (2B, n, values) of the tokens from place `begin` on; extend: keep keys and values of all but the
        last cell."""
        model = self.model
        c = model.conditioning(t, y)
        x = self.norm(model.z_proj(tokens) + positions(model.encoder_pos_embed_learned, tokens, begin))
        x = x * model.z_proj_ln.weight
        for index, block in enumerate(model.blocks):
            if index == len(model.encoder_blocks):
                x = model.decoder_embed(self.norm(x) * model.encoder_norm.weight)
                x = x + positions(model.decoder_pos_embed_learned, tokens, begin)
            x = self.block(index, block, x, c, begin, extend)
        return model.pred(self.norm(x) * model.decoder_norm.weight)

    def block(self, index: int, block: XARBlock, x: Tensor, c: Tensor, begin: int, extend: bool) -> Tensor:
        modulation = block.ada_lin(c).repeat_interleave(self.tokens, dim=1)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attention(index, block, self.norm(x) * (1 + scale1) + shift1, begin, extend)
        z = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1_g(z)) * block.mlp.fc1_x(z))

    def attention(self, index: int, block: XARBlock, x: Tensor, begin: int, extend: bool) -> Tensor:
        batch, length, width = x.shape
        heads = block.attn.num_heads
        qkv = block.attn.qkv(x).reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, k = self.rotate(q, begin), self.rotate(k, begin)
        cached = self.cache[index]
        if cached is not None:
            k, v = torch.cat([cached[0], k], dim=2), torch.cat([cached[1], v], dim=2)
        mask = None
        if extend:
            self.cache[index] = (k[:, :, : -self.tokens], v[:, :, : -self.tokens])
            mask = self.mask[begin : begin + length, : k.shape[2]]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return block.attn.proj(out.transpose(1, 2).reshape(batch, length, width))

    def rotate(self, x: Tensor, begin: int) -> Tensor:
        cos, sin = (table[begin : begin + x.shape[2]] for table in (self.cos, self.sin))
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


def positions(table: Tensor, tokens: Tensor, begin: int) -> Tensor:
    return table[:, begin : begin + tokens.shape[1]]
