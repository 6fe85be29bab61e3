"""SiT, the scalable interpolant transformer (arXiv 2401.08740), as the REPA and HASTE trainers use it.

The names of its parameters are those of the public checkpoints. Time runs from t = 1 (noise) to t = 0 (data).

Reading order: Attention, SiTBlock, SiT. For alignment the forward pass is given `aligned_layers` and returns q and k of
those layers as attention used them: views of the one qkv projection. No attention map is formed, and nothing is kept of
other layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.models.family import Family, ForeignCheckpoints, Layout, ModelOutput, PublishedAlignment
from haste.models.layers import (
    BACKENDS,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    Modulation,
    PatchEmbedder,
    TimestepEmbedder,
    build_projector,
    check_config_limits,
    check_request,
    check_sizes,
    initialize_linear,
    modulate,
    sincos_positions,
    size_flag,
    unpatchify,
)
from haste.models.registry import register
from haste.models.sit_checkpoints import NAMES, SiTCheckpoints
from haste.validation import build, check

QueriesKeys = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, width) tokens."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, backend: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = BACKENDS[backend]
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, QueriesKeys]:
        """Returns the output (B, N, width) and the q and k, each (B, H, N, D), that made it."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast on a GPU LayerNorm returns float32; attention runs in the type of the projection.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = self.attend(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width)), (q, k)


class SiTBlock(nn.Module):
    """Attention, then MLP, each behind an adaLN and in front of a gate."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, attention: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, qk_norm, attention)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
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


class SiT(nn.Module):
    """A diffusion transformer that predicts the velocity of an image at time t, given its class.

    Args:
        input_size: side S of the image (or latent).
        patch_size: side of a patch; S must be a multiple of it. N = (S / patch_size)² tokens.
        in_channels: channels C of the image.
        hidden_size: width of the tokens, a multiple of 4 and of num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over hidden_size.
        class_dropout_prob: while training, how often the class becomes the null class (number num_classes).
            0: the model has no null class.
        num_classes: classes, without the null class.
        qk_norm: LayerNorm on q and k per head.
        fused_attn: False computes attention step by step, with its map in memory, whatever `attention` says.
        attention: what computes it: sdpa, flash-attn or xformers.
        encoder_depth: the projectors read the tokens after this block, counted from 1.
        z_dims: one projector per entry, onto that many features. Empty: no projector.
        projector_dim: hidden width of the projectors.

    Raises:
        UserError: sizes that do not fit together.
    """

    family = "sit"
    outputs = 1  # numbers that are predicted of each number of x

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        qk_norm: bool = False,
        fused_attn: bool = True,
        attention: str = "sdpa",
        encoder_depth: int = 8,
        z_dims: Sequence[int] = (),
        projector_dim: int = 2048,
    ) -> None:
        super().__init__()
        check_sizes({"input_size": input_size, "patch_size": patch_size, "hidden_size": hidden_size, "depth": depth,
                      "num_heads": num_heads})  # fmt: skip
        if not 0 <= class_dropout_prob < 1:
            raise UserError(f"class_dropout_prob must be at least 0 and below 1, got {class_dropout_prob}")
        if z_dims and not 1 <= encoder_depth <= depth:
            raise UserError(f"encoder_depth must be from 1 to the depth, {depth}, got {encoder_depth}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.encoder_depth = encoder_depth

        # The order of registration is the public one: an optimizer's state counts parameters in this order.
        grid = input_size // patch_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, attention if fused_attn else "plain")
            for _ in range(depth)
        )
        with torch.random.fork_rng(devices=[]):  # the trunk's weights do not depend on whether there are projectors
            self.projectors = nn.ModuleList(build_projector(hidden_size, projector_dim, z) for z in z_dims)
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels * self.outputs)
        self._initialize()

    def _initialize(self) -> None:
        """As DiT: Xavier on linear maps, normal(0.02) on the embeddings, zeros where a block or the output is gated.

        The projectors come last, so that one seed gives the same trunk with them and without.
        """
        for part in (self.t_embedder, self.blocks, self.final_layer):
            part.apply(initialize_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a linear map per patch; a view, so in place
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.projectors.apply(initialize_linear)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of the images that the model wants outside autocast."""
        return self.x_embedder.proj.weight.dtype

    @property
    def tokens_shape(self) -> tuple[int, int]:
        """(N, width) of one image."""
        return tuple(self.pos_embed.shape[1:])

    @property
    def null_label(self) -> int | None:
        """The class that stands for none, for guidance; None if the model was built without one."""
        return self.num_classes if self.y_embedder.dropout > 0 else None

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, S, S), t (B,) in [0, 1], y (B,) classes to tokens (B, N, width) and conditioning (B, width)."""
        wanted = (self.in_channels, self.input_size, self.input_size)
        if x.dim() != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x must have shape (batch, {', '.join(map(str, wanted))}), got {tuple(x.shape)}")
        for name, value in (("t", t), ("y", y)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor of shape ({x.shape[0]},), as x, got {value!r}")
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name} must have shape ({x.shape[0]},), as x, got {tuple(value.shape)}")
        return self.tokens(x), self.conditioning(t, y)

    def tokens(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) to tokens (B, N, width) with their positions."""
        return self.x_embedder(x) + self.pos_embed

    def streams(self, x: Tensor, y: Tensor) -> Tensor:
        """What the first block takes: the image's tokens alone."""
        return self.tokens(x)

    def prefix(self, y: Tensor | None = None) -> int:
        """A class is no stream of tokens."""
        return 0

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B,) and y (B,) to what steers every block, (B, width); t (S, 1) and y (B,) to (S, B, width)."""
        return self.t_embedder(t) + self.y_embedder(y)

    def output(self, tokens: Tensor, c: Tensor) -> ModelOutput:
        """What the model returns when nothing is aligned, made of the last tokens and the conditioning."""
        return ModelOutput(self.finish(tokens, c), [], [])

    def finish(self, tokens: Tensor, c: Tensor) -> Tensor:
        """The last tokens (B, N, width) and the conditioning to the prediction (B, outputs·C, S, S)."""
        return unpatchify(self.final_layer(tokens, c), self.patch_size)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, aligned_layers: Sequence[int] = (), project: bool = False
    ) -> ModelOutput:
        """The velocity, and on request what alignment with a teacher reads.

        Args:
            x: (B, C, S, S), the image at time t.
            t: (B,), in [0, 1]; 1 is noise.
            y: (B,), int64, classes.
            aligned_layers: blocks, counted from 0, whose q and k are returned.
            project: return the projections of the tokens after block `encoder_depth`.

        Raises:
            ValueError: a wrong shape, a layer that does not exist, `project` without projectors.
        """
        check_request(len(self.blocks), self.projectors, aligned_layers, project)

        tokens, c = self.embed(x, t, y)
        kept: dict[int, QueriesKeys] = {}
        projections: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens, queries_keys = block(tokens, c, keep_queries_keys=index in aligned_layers)
            if queries_keys is not None:
                kept[index] = queries_keys
            if project and index + 1 == self.encoder_depth:
                projections = [projector(tokens) for projector in self.projectors]
        return ModelOutput(self.finish(tokens, c), [kept[layer] for layer in aligned_layers], projections)


SIT_SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""Depth, width and heads of the published sizes."""

SIT_MODELS = {
    f"SiT-{size}/{patch}": {**shape, "patch_size": patch} for size, shape in SIT_SIZES.items() for patch in (1, 2, 4, 8)
}
"""The published models, "SiT-S/1" to "SiT-XL/8", by the arguments that make them."""


@dataclass(frozen=True)
class _Config:
    """The arguments of SiT that a checkpoint holds: all but z_dims. Raises UserError for sizes that no SiT has."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    input_size: int
    in_channels: int
    num_classes: int
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    qk_norm: bool = False
    fused_attn: bool = True
    attention: Literal["sdpa", "flash-attn", "xformers"] = "sdpa"
    encoder_depth: int = 8
    projector_dim: int = 2048

    def __post_init__(self) -> None:
        check_config_limits(self, LARGEST)


# Far above what anybody trains, and far below what no machine can hold.
LARGEST = {
    "input_size": 8192, "patch_size": 1024, "in_channels": 4096, "hidden_size": 16_384, "depth": 200,
    "num_heads": 1024, "num_classes": 10_000_000, "encoder_depth": 200, "projector_dim": 65_536,
}  # fmt: skip

# HASTE (arXiv 2505.16792), for DINOv2-B: the same layers at 256 and 512 pixels. S is not in the paper; it is as deep
# as B.
DEEP = PublishedAlignment("4:8,5:9,6:10,7:11", encoder_depth=8)
PUBLISHED_ALIGNMENT = {
    "SiT-S": PublishedAlignment("", encoder_depth=5),
    "SiT-B": PublishedAlignment("2:7,3:9,4:11", encoder_depth=5),
    "SiT-L": DEEP,
    "SiT-XL": DEEP,
}


class SiTFamily(Family):
    """SiT, conditioned on a class."""

    name = "sit"
    title = "SiT"
    module: type[SiT] = SiT
    published_alignment = PUBLISHED_ALIGNMENT
    foreign: ForeignCheckpoints = SiTCheckpoints()
    sizes = {
        **SIT_MODELS,
        # 8 x 8 pixels as 16 tokens: small enough for two processor cores.
        "SiT-Digits/2": {"depth": 6, "hidden_size": 96, "num_heads": 4, "patch_size": 2},
    }

    def build(self, config: dict[str, Any], z_dims: Sequence[int] = ()) -> SiT:
        return self.module(**config, z_dims=z_dims)

    def config_for(self, size: Mapping[str, Any], settings: Any, data: Any) -> dict[str, Any]:
        check_sizes({**size, "input_size": data.input_size}, size_flag)
        return {
            **size,
            "input_size": data.input_size,
            "in_channels": data.channels,
            "num_classes": data.num_classes,
            "class_dropout_prob": settings.cfg_prob,
            "qk_norm": settings.qk_norm,
            "fused_attn": settings.fused_attn,
            "attention": settings.attention,
            "encoder_depth": settings.encoder_depth,
            "projector_dim": settings.projector_dim,
        }

    def checked(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        given = asdict(build(_Config, config, f"model_config of {source}"))
        return {field.name: given[field.name] for field in fields(_Config) if field.name in config}

    def layout(self, config: Mapping[str, Any]) -> Layout:
        side, channels = config["input_size"], config["in_channels"]
        grid = side // config["patch_size"]
        return Layout((channels, side, side), grid, config["depth"], config["num_heads"], config["num_classes"])

    def for_sampling(self, config: Mapping[str, Any], fused_attn: bool = True) -> dict[str, Any]:
        return {**config, "attention": "sdpa", "fused_attn": fused_attn}  # sdpa is everywhere

    def training_flops(self, config: Mapping[str, Any]) -> int:
        """Those of the matrix products: forward, and twice that for backward."""
        width, patch = config["hidden_size"], config["patch_size"]
        tokens = (config["input_size"] // patch) ** 2
        block = tokens * 12 * width * width + 2 * tokens * tokens * width + 6 * width * width
        ends = (1 + self.module.outputs) * tokens * patch * patch * config["in_channels"] * width
        return 3 * 2 * (config["depth"] * block + ends)

    def null(self, model: nn.Module) -> Tensor | None:
        return None if model.null_label is None else torch.tensor(model.null_label)

    def cached(self, model: nn.Module) -> SiT:
        return model

    def infer_config(self, weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any] | None:
        if not all(name in weights for name in NAMES):
            return None
        weights = self.foreign.rename(weights)
        for name, dims in zip(NAMES, (3, 4, 2), strict=True):
            if weights[name].dim() != dims:
                raise UserError(
                    f"the weights are not those of a {self.title}: {name} has shape {tuple(weights[name].shape)}"
                )
        (_, tokens, width), (_, channels, patch, _), (rows, _) = (weights[name].shape for name in NAMES)
        numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
        depth = sum(number.isdecimal() for number in numbers)
        heads = {s["num_heads"] for s in self.sizes.values() if (s["depth"], s["hidden_size"]) == (depth, width)}
        if not heads:
            raise UserError(
                f"the weights are a {self.title} of depth {depth} and width {width}, which none of the known sizes has"
            )
        projector = weights.get("projectors.0.0.weight")
        num_classes = check(args.get("num_classes"), int | None, "num_classes of its settings") or rows - 1
        if rows - num_classes not in (0, 1):
            raise UserError(f"its table of labels has {rows} rows, which fits no model of {num_classes} classes")
        encoder_depth = check(args.get("encoder_depth"), int | None, "encoder_depth of its settings") or 8
        return {
            "depth": depth,
            "hidden_size": width,
            "num_heads": heads.pop(),
            "patch_size": patch,
            "input_size": math.isqrt(tokens) * patch,
            "in_channels": channels,
            "num_classes": num_classes,
            "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
            "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
            "encoder_depth": min(encoder_depth, depth),
            "projector_dim": 2048 if projector is None or not projector.dim() else len(projector),
        }


register(SiTFamily())
