"""The block of SiT and DiT (arXiv 2212.09748): attention, then an MLP, each behind an adaLN and in front of a gate.

q and k go out as attention used them: without norm and rotary positions, views of the one qkv projection. No attention
map is formed. RMS norms, SwiGLU and rotary positions are those of LightningDiT (arXiv 2501.01423).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haste.models.layers import BACKENDS, MLPS, Modulation, RMSNorm, RotaryPositions, adaln_norm, modulate

QueriesKeys = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, width) tokens."""

    rope: RotaryPositions | None

    def __init__(
        self,
        width: int,
        num_heads: int,
        qk_norm: bool,
        backend: str,
        norm: str = "layernorm",
        rope: RotaryPositions | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = BACKENDS[backend]
        self.qkv = nn.Linear(width, 3 * width)
        make_norm = RMSNorm if norm == "rmsnorm" else nn.LayerNorm
        self.q_norm = make_norm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = make_norm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        object.__setattr__(self, "rope", rope)  # the model's, whose tables are in its state_dict once: no submodule

    def forward(self, tokens: Tensor) -> tuple[Tensor, QueriesKeys]:
        """Returns the output (B, N, width) and the q and k, each (B, H, N, D), that made it."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        # Under autocast on a GPU LayerNorm returns float32; attention runs in the type of the projection.
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = self.attend(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width)), (q, k)


class SiTBlock(nn.Module):
    """Attention, then MLP, each behind an adaLN and in front of a gate."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        attention: str,
        norm: str = "layernorm",
        mlp: str = "gelu",
        rope: RotaryPositions | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = adaln_norm(norm, width)
        self.attn = Attention(width, num_heads, qk_norm, attention, norm, rope)
        self.norm2 = adaln_norm(norm, width)
        self.mlp = MLPS[mlp](width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, c: Tensor) -> Modulation:
        """The conditioning (B, width) to this block's six vectors."""
        return Modulation(*self.adaLN_modulation(c).chunk(6, dim=1))

    def attention_branch(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, QueriesKeys]:
        """The attention output before its gate, (B, N, width), and the q and k behind it."""
        return self.attn(modulate(self.norm1(tokens), shift, scale))

    def mlp_branch(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The MLP output before its gate, (B, N, width)."""
        return self.mlp(modulate(self.norm2(tokens), shift, scale))

    def forward(self, tokens: Tensor, c: Tensor, keep_queries_keys: bool = False) -> tuple[Tensor, QueriesKeys | None]:
        """tokens (B, N, width) and conditioning (B, width) to the next tokens, and q and k if they are wanted.

        Everything goes out by return, so that activation checkpointing may run this twice.
        """
        m = self.modulation(c)
        queries_keys: QueriesKeys | None
        branch, queries_keys = self.attention_branch(tokens, m.shift_attn, m.scale_attn)
        if not keep_queries_keys:
            queries_keys = None  # frees the projection before the MLP needs its memory
        tokens = tokens + m.gate_attn.unsqueeze(1) * branch
        tokens = tokens + m.gate_mlp.unsqueeze(1) * self.mlp_branch(tokens, m.shift_mlp, m.scale_mlp)
        return tokens, queries_keys

    # ---- for caches, as `haste.models.CachedBlock` has it ----

    def run(self, tokens: Tensor, c: Tensor, image_alone: bool = False) -> Tensor:
        return self(tokens, c)[0]

    def record(self, tokens: Tensor, c: Tensor, attention: Tensor, mlp: Tensor) -> Tensor:
        """The forward pass with copies of both outputs, and with addcmul, which reads the tokens once less."""
        m = self.modulation(c)
        branch = self.attention_branch(tokens, m.shift_attn, m.scale_attn)[0]
        attention.copy_(branch)
        tokens = torch.addcmul(tokens, m.gate_attn.unsqueeze(1), branch)
        branch = self.mlp_branch(tokens, m.shift_mlp, m.scale_mlp)
        mlp.copy_(branch)
        return torch.addcmul(tokens, m.gate_mlp.unsqueeze(1), branch)
