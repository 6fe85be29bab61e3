"""SiT, the scalable interpolant transformer (arXiv 2401.08740), as the REPA and HASTE trainers use it.

The names of its parameters are those of the public checkpoints. Time runs from t = 1 (noise) to t = 0 (data).

Its block is in `haste.models.sit_block`, its family in `haste.models.sit_family`. For alignment forward is given
`aligned_layers` and returns q and k of those layers; nothing is kept of other layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.models.family import ModelOutput
from haste.models.layers import (
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    RotaryPositions,
    TimestepEmbedder,
    build_projector,
    check_parts,
    check_request,
    check_sizes,
    initialize_linear,
    sincos_positions,
    unpatchify,
)
from haste.models.sit_block import QueriesKeys, SiTBlock


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
        qk_norm: normalize q and k per head, by LayerNorm, or by RMS norm if that is `norm`.
        positions: sincos, a fixed table that is added to the tokens; rope, rotary positions of q and k besides.
        norm: layernorm, or rmsnorm, which has weights of its own, in front of each adaLN.
        mlp: gelu, or swiglu, whose hidden width is two thirds as wide.
        fused_attn: False computes attention step by step, with its map in memory, whatever `attention` says.
        attention: what computes it: sdpa, flash-attn or xformers.
        encoder_depth: the projectors read the tokens after this block, counted from 1.
        z_dims: one projector per entry, onto that many features. Empty: no projector.
        projector_dim: hidden width of the projectors.
        projection_layer_type: "mlp", "conv" or "sra", see `haste.models.layers.build_projector`.

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
        positions: str = "sincos",
        norm: str = "layernorm",
        mlp: str = "gelu",
        fused_attn: bool = True,
        attention: str = "sdpa",
        encoder_depth: int = 8,
        z_dims: Sequence[int] = (),
        projector_dim: int = 2048,
        projection_layer_type: str = "mlp",
    ) -> None:
        super().__init__()
        check_sizes({"input_size": input_size, "patch_size": patch_size, "hidden_size": hidden_size, "depth": depth,
                      "num_heads": num_heads, "positions": positions})  # fmt: skip
        check_parts(positions=positions, norm=norm, mlp=mlp)
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
        self.feat_rope = RotaryPositions(hidden_size // num_heads, grid) if positions == "rope" else None
        backend = attention if fused_attn else "plain"
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, backend, norm, mlp, self.feat_rope)
            for _ in range(depth)
        )
        with torch.random.fork_rng(devices=[]):  # the trunk's weights do not depend on whether there are projectors
            self.projectors = nn.ModuleList(
                build_projector(hidden_size, projector_dim, z, projection_layer_type) for z in z_dims
            )
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels * self.outputs, norm)
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
    def input_shape(self) -> tuple[int, ...]:
        """(C, S, S) of one x."""
        return (self.in_channels, self.input_size, self.input_size)

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
        if x.shape[1:] != self.input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(f"x must have shape (batch, {wanted}), got {tuple(x.shape)}")
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
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        aligned_layers: Sequence[int] = (),
        project: bool = False,
        tokens_after: int = 0,
    ) -> ModelOutput:
        """The velocity, and on request what alignment with a teacher reads.

        Args:
            x: (B, C, S, S), the image at time t.
            t: (B,), in [0, 1]; 1 is noise.
            y: (B,), int64, classes.
            aligned_layers: blocks, counted from 0, whose q and k are returned.
            project: return the projections of the tokens after block `encoder_depth`.
            tokens_after: block, counted from 1, whose tokens of the image are returned; 0: none.

        Raises:
            ValueError: a wrong shape, a layer that does not exist, `project` without projectors.
        """
        check_request(len(self.blocks), self.projectors, aligned_layers, project, tokens_after)

        tokens, c = self.embed(x, t, y)
        kept: dict[int, QueriesKeys] = {}
        projections: list[Tensor] = []
        hidden: Tensor | None = None
        for index, block in enumerate(self.blocks):
            tokens, queries_keys = block(tokens, c, keep_queries_keys=index in aligned_layers)
            if queries_keys is not None:
                kept[index] = queries_keys
            if index + 1 == tokens_after:
                hidden = tokens
            if project and index + 1 == self.encoder_depth:
                projections = [projector(tokens) for projector in self.projectors]
        prediction = self.finish(tokens, c)
        return ModelOutput(prediction, [kept[layer] for layer in aligned_layers], projections, tokens=hidden)
