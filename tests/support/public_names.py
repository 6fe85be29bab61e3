"""The public SiT, DiT and LightningDiT: names and shapes of their checkpoints, and their forward pass from the papers'
formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def public_shapes(
    depth: int, width: int, tokens: int, patch: int, channels: int, z_dims=(), outputs: int = 1
) -> dict[str, tuple]:
    """Names and shapes of a public checkpoint on timm's layers, 1000 classes and a null class: REPA's SiT, or with two
    outputs for each number of the image DiT."""
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (patch * patch * channels * outputs, width),
        "final_layer.linear.bias": (patch * patch * channels * outputs,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    linear = {
        "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width),
    }  # fmt: skip
    for block in range(depth):
        for name, shape in linear.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
    for index, z_dim in enumerate(z_dims):
        for name, shape in (("0", (2048, width)), ("2", (2048, 2048)), ("4", (z_dim, 2048))):
            shapes[f"projectors.{index}.{name}.weight"] = shape
            shapes[f"projectors.{index}.{name}.bias"] = shape[:1]
    return shapes


def lightningdit_shapes(
    depth: int, width: int, heads: int, grid: int, patch: int, channels: int, qk_norm: bool = False
) -> dict[str, tuple]:
    """Names and shapes of a checkpoint of LightningDiT with RoPE, RMSNorm and SwiGLU, 1000 classes and a null class."""
    shapes = {
        name: shape
        for name, shape in public_shapes(depth, width, grid**2, patch, channels).items()
        if ".mlp.fc" not in name
    }
    hidden = int(2 / 3 * int(width * 4.0))
    shapes["feat_rope.freqs_cos"] = shapes["feat_rope.freqs_sin"] = (grid**2, width // heads)
    shapes["final_layer.norm_final.weight"] = (width,)
    for block in range(depth):
        shapes[f"blocks.{block}.mlp.w12.weight"] = (2 * hidden, width)
        shapes[f"blocks.{block}.mlp.w12.bias"] = (2 * hidden,)
        shapes[f"blocks.{block}.mlp.w3.weight"] = (width, hidden)
        shapes[f"blocks.{block}.mlp.w3.bias"] = (width,)
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{block}.{norm}.weight"] = (width,)
        for norm in ("q_norm", "k_norm") if qk_norm else ():
            shapes[f"blocks.{block}.attn.{norm}.weight"] = (width // heads,)
    return shapes


def plain_rotate(x: Tensor, grid: int) -> Tensor:
    """Rotary positions of x (B, N, D) as LightningDiT has them: token by token, pair by pair."""
    turned, half = x.clone(), x.shape[-1] // 2
    for n in range(grid * grid):
        for first, coordinate in zip((0, half), divmod(n, grid), strict=True):
            for j in range(half // 2):
                angle = coordinate / 10000 ** (2 * j / half)
                a, b = x[:, n, first + 2 * j], x[:, n, first + 2 * j + 1]
                turned[:, n, first + 2 * j] = a * math.cos(angle) - b * math.sin(angle)
                turned[:, n, first + 2 * j + 1] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def plain_forward(
    state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, heads: int, patch: int, token: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """SiT, DiT and LightningDiT once more, from the papers' words and a state dict: loops and formulas, nothing of
    haste.models. Which of them it is, the names of the weights tell.

    Args:
        token: of REG's weights the class token (B, K).

    Returns:
        (B, C, S, S), or of DiT's weights (B, 2·C, S, S), the noise and then the variance; with a class token that and
        the token's velocity (B, K).
    """

    def linear(name, value):
        return value @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(value, name):
        if name + ".weight" in state:  # RMSNorm
            return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name + ".weight"]
        value = value - value.mean(-1, keepdim=True)
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(value):
        return value / (1 + (-value).exp())

    batch, _, size, _ = x.shape
    grid = size // patch
    kernel = state["x_embedder.proj.weight"]
    cells = [
        (x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten(1) @ kernel.flatten(1).T)
        for r in range(grid)
        for c in range(grid)
    ]
    h = torch.stack(cells, dim=1) + state["x_embedder.proj.bias"]
    if token is not None:
        embedded = (
            norm(linear("cls_projectors2", token), "no weight of an RMSNorm") * state["wg_norm.weight"]
            + state["wg_norm.bias"]
        )
        h = torch.cat([embedded[:, None], h], dim=1)
    h = h + state["pos_embed"]
    angles = torch.stack([t * 10000 ** (-i / 128) for i in range(128)], dim=1)
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time)))
    c = silu(time + state["y_embedder.embedding_table.weight"][y])

    for n in range(sum(key.endswith("attn.qkv.bias") for key in state)):
        block = f"blocks.{n}."
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(block + "adaLN_modulation.1", c)[:, None].chunk(6, -1)
        q, k, v = linear(block + "attn.qkv", norm(h, block + "norm1") * (1 + scale1) + shift1).chunk(3, -1)
        attended = []
        for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            if block + "attn.q_norm.weight" in state:
                qh, kh = norm(qh, block + "attn.q_norm"), norm(kh, block + "attn.k_norm")
            if "feat_rope.freqs_cos" in state:
                first = qh.shape[1] - grid * grid  # a class token is no part of the image
                qh, kh = (torch.cat([r[:, :first], plain_rotate(r[:, first:], grid)], dim=1) for r in (qh, kh))
            logits = qh @ kh.mT / math.sqrt(qh.shape[-1])
            attended.append(logits.exp() / logits.exp().sum(-1, keepdim=True) @ vh)
        h = h + gate1 * linear(block + "attn.proj", torch.cat(attended, -1))
        u = norm(h, block + "norm2") * (1 + scale2) + shift2
        if block + "mlp.w12.weight" in state:
            u, value = linear(block + "mlp.w12", u).chunk(2, -1)
            u = linear(block + "mlp.w3", silu(u) * value)
        else:
            u = linear(block + "mlp.fc1", u)
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
            u = linear(block + "mlp.fc2", u)
        h = h + gate2 * u

    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    h = norm(h, "final_layer.norm_final") * (1 + scale) + shift
    pixels = linear("final_layer.linear", h if token is None else h[:, 1:])
    outputs = pixels.shape[-1] // patch**2
    image = x.new_empty(batch, outputs, size, size)
    for n in range(grid * grid):
        r, col = divmod(n, grid)
        cell = pixels[:, n].reshape(batch, patch, patch, outputs).permute(0, 3, 1, 2)
        image[:, :, r * patch : (r + 1) * patch, col * patch : (col + 1) * patch] = cell
    return image if token is None else (image, linear("final_layer.linear_cls", h[:, 0]))
