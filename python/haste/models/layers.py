"""Parts that several families have: attention backends, norms, adaLN, embedders of patches, times and classes, MLPs,
the final layer, positions, and the check of sizes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haste.errors import UserError
from haste.validation import check_limits

# ---- attention: softmax(q·kᵀ·d^−½)·v; q, k, v and the result are (B, H, N, D) ----


def step_by_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the map in memory."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package flash-attn: CUDA, fp16 and bf16."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package xformers."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": F.scaled_dot_product_attention,
    "flash-attn": flash_attn,
    "xformers": xformers,
    "plain": step_by_step,
}

PACKAGES = {"flash-attn": "flash_attn", "xformers": "xformers"}


def check_backend(name: str) -> None:
    """UserError if its package is not installed."""
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        instead = f"pip install {name}, or --attention sdpa"
        raise UserError(f"--attention is {name}, and the package {package} is not installed; {instead}")


# ---- norms ----


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x/√(mean x² + 1e-6), at least in float32, in x's type."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = None if weight is None else weight.to(wide.dtype)
    return F.rms_norm(wide, x.shape[-1:], weight, eps=1e-6).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


def adaln_norm(kind: str, width: int) -> nn.Module:
    """The norm in front of adaLN's scale and shift: "layernorm" without weights of its own, or "rmsnorm" with one."""
    return RMSNorm(width) if kind == "rmsnorm" else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


# ---- what blocks and their ends are made of ----


class Modulation(NamedTuple):
    """The six (B, width) vectors with which the conditioning steers one block (adaLN-Zero, arXiv 2212.09748)."""

    shift_attn: Tensor
    scale_attn: Tensor
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """tokens · (1 + scale) + shift; tokens (B, N, width), shift and scale (B, width)."""
    return tokens * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbedder(nn.Module):
    """Images (B, C, S, S) to tokens (B, (S/P)², width), row by row: one linear map per patch."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times (...) to (..., width): cosines, then sines, of t·10000^(-i/128), and a two-layer perceptron.

    t is fed as it is: in [0, 1], or DiT's whole numbers to 999.
    """

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def frequencies(self, t: Tensor) -> Tensor:
        """(...) to (..., num_frequencies), float32 whatever the type of t (float64 for float64)."""
        dtype = torch.promote_types(t.dtype, torch.float32)
        half = self.num_frequencies // 2
        exponent = torch.arange(half, dtype=dtype, device=t.device) / half
        angles = t[..., None].to(dtype) * torch.exp(-math.log(10000.0) * exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype
        if not t.is_floating_point():
            t = t.to(torch.promote_types(dtype, torch.float32))
        return self.mlp(self.frequencies(t).to(dtype))


class LabelEmbedder(nn.Module):
    """Classes (B,) to (B, width). While training, a label becomes the null class with probability `dropout`.

    The null class, for classifier-free guidance, is number `num_classes`; its row exists only if dropout > 0.
    """

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), width)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class SwiGLU(nn.Module):
    """w3(SiLU(a) ⊙ b) with a, b = w12(x) (arXiv 2002.05202), under the names of DINOv2 and LightningDiT.

    Args:
        hidden: width of an MLP of two layers, of which this one, of three, has two thirds.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * hidden)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


MLPS: dict[str, Callable[[int, int], nn.Module]] = {"gelu": Mlp, "swiglu": SwiGLU}


class FinalLayer(nn.Module):
    """adaLN without a gate, then one linear layer from tokens to patches."""

    def __init__(self, width: int, patch_values: int, norm: str = "layernorm") -> None:
        super().__init__()
        self.norm_final = adaln_norm(norm, width)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Patches (B, N, P·P·C) of a square image, row by row, each as (row, column, channel), to (B, C, S, S)."""
    batch, count, values = patches.shape
    grid, p = math.isqrt(count), patch_size
    patches = patches.view(batch, grid, grid, p, p, values // (p * p)).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(batch, values // (p * p), grid * p, grid * p)  # not -1, for batch may be 0


class ConvProjector(nn.Module):
    """iREPA's projector (arXiv 2512.10794): one 3 x 3 convolution over the square grid of tokens, zeros around it.

    Tokens (B, N, width) row by row to (B, N, out). The name of its weights is the public one.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.projection_layer = nn.Conv2d(width, out, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        return self.projection_layer(tokens.mT.unflatten(2, (side, side))).flatten(2).mT


PROJECTORS = ("mlp", "conv", "sra")


def build_projector(width: int, hidden: int, out: int, kind: str = "mlp") -> nn.Module:
    """What maps tokens (B, N, width) onto a teacher's features (B, N, out).

    Args:
        hidden: width between the layers of "mlp".
        kind: "mlp", REPA's (arXiv 2410.06940), three linear layers with SiLU; "conv", iREPA's, which wants the tokens
            row by row; or "sra", that of SRA (arXiv 2505.02831), two linear layers, the hidden one as wide as both ends
            together.

    Raises:
        UserError: another kind.
    """
    if kind not in PROJECTORS:
        raise UserError(f"projection_layer_type must be one of {', '.join(PROJECTORS)}, got {kind!r}")
    if kind == "conv":
        return ConvProjector(width, out)
    if kind == "sra":
        return nn.Sequential(nn.Linear(width, width + out), nn.SiLU(), nn.Linear(width + out, out))
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )


def initialize_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and a zero bias, if it is a linear map; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed positions of a square grid of tokens, row by row (MAE, arXiv 2111.06377), as DiT and SiT have them.

    The first half of the channels encodes the column, the second half the row; each half is sines, then cosines,
    of the coordinate times 10000^(-i/(width/4)).

    Args:
        width: channels, a multiple of 4.
        grid: tokens per side.

    Returns:
        (grid², width), float32. Computed in double precision.
    """
    coordinate = torch.arange(grid, dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(coordinate, frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    column = axis[None, :, :].expand(grid, -1, -1)
    row = axis[:, None, :].expand(-1, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid * grid, width).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of channels (2j, 2j+1) of x (..., N, D) by angles (N, D/2) (RoPE, arXiv 2104.09864)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RotaryPositions(nn.Module):
    """Rotates queries and keys by the row of their token, and the second half of the channels by its column (RoPE,
    arXiv 2104.09864, of two axes as in EVA-02 and LightningDiT).

    Channels (2j, 2j+1) of a half turn by the coordinate times 10000^(−j/n), n = head_dim / 4. The tables are buffers
    under LightningDiT's names, each column of a pair's twice.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: int) -> None:
        super().__init__()
        n = head_dim // 4
        angles = torch.outer(torch.arange(grid).double(), 10000.0 ** (-torch.arange(n).double() / n))
        row = angles[:, None, :].expand(-1, grid, -1)
        column = angles[None, :, :].expand(grid, -1, -1)
        angles = torch.cat([row, column], dim=2).flatten(0, 1).repeat_interleave(2, dim=1)  # (grid², head_dim)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., P + N, head_dim); the first P tokens are no part of the image, and stay as they are."""
        first = x.shape[-2] - len(self.freqs_cos)
        image = rotate(x[..., first:, :], self.freqs_cos[:, ::2], self.freqs_sin[:, ::2]).to(x.dtype)
        return torch.cat([x[..., :first, :], image], dim=-2) if first else image


def check_sizes(sizes: Mapping[str, Any], shown: Callable[[str], str] = str) -> None:
    """Raise UserError for sizes that do not fit together, under the names that `shown` gives them."""
    for name in ("input_size", "patch_size", "hidden_size", "depth", "num_heads"):
        if sizes[name] < 1:
            raise UserError(f"{shown(name)} must be at least 1, got {sizes[name]}")
    for name, divisor in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
        if sizes[name] % sizes[divisor]:
            raise UserError(
                f"{shown(name)} must be a multiple of {shown(divisor)}, {sizes[divisor]}, got {sizes[name]}"
            )
    channels = sizes["hidden_size"] // sizes["num_heads"]
    if sizes.get("positions") == "rope" and channels % 4:
        raise UserError(f"{shown('positions')} must be sincos for heads of {channels} channels, as rope takes a "
                        "multiple of 4, got rope")  # fmt: skip
    if sizes["hidden_size"] % 4:
        name, size = shown("hidden_size"), sizes["hidden_size"]
        raise UserError(f"{name} must be a multiple of 4, for the sine-cosine positions, got {size}")


PARTS = {"positions": ("sincos", "rope"), "norm": ("layernorm", "rmsnorm"), "mlp": tuple(MLPS)}


def check_parts(**chosen: str) -> None:
    """Raise UserError for positions, a norm or an MLP that there is not."""
    for name, value in chosen.items():
        if value not in PARTS[name]:
            raise UserError(f"{name} must be one of {', '.join(PARTS[name])}, got {value!r}")


def size_flag(name: str) -> str:
    """A size as the flags of `haste train` name it."""
    return "the side of the model's input" if name == "input_size" else f"--{name.replace('_', '-')}"


MOST_TOKENS = 2**18  # of an image; far above what anybody trains, and far below what no machine can hold


def check_config_limits(config: Any, largest: Mapping[str, int]) -> None:
    """Raise UserError for a config with `input_size`, `patch_size` and `mlp_ratio` that no model can have."""
    check_limits(config, largest)
    if (config.input_size // config.patch_size) ** 2 > MOST_TOKENS:
        raise UserError(f"its model must have at most {MOST_TOKENS} tokens, got {config.input_size} / "
                        f"{config.patch_size} along a side")  # fmt: skip
    if not 1 / 64 <= config.mlp_ratio <= 64:
        raise UserError(f"mlp_ratio of its model must be from 1/64 to 64, got {config.mlp_ratio}")


def check_request(
    depth: int, projectors: nn.ModuleList, aligned_layers: Sequence[int], project: bool, tokens_after: int = 0
) -> None:
    """Raise ValueError for what a model of this depth with these projectors cannot return."""
    for layer in aligned_layers:
        if not 0 <= layer < depth:
            raise ValueError(f"aligned_layers must be from 0 to {depth - 1}, got {layer}")
    if not 0 <= tokens_after <= depth:
        raise ValueError(f"tokens_after must be from 1 to {depth}, or 0 for none, got {tokens_after}")
    if project and not projectors:
        raise ValueError("project must be False for a model without projectors, got True; build it with z_dims")
