"""MM-DiT, the two-stream transformer of Stable Diffusion 3 (arXiv 2403.03206), as REPA and HASTE train it on MS-COCO.

Text and image are two sequences with weights of their own, which meet in one attention over both. The names of the
parameters are those of the public checkpoints. Time runs from t = 1 (noise) to t = 0 (data); the text features come
from a frozen encoder (haste/text.py) and only the time steers the blocks.

Reading order: Stream, JointBlock, MMDiT. For alignment the forward pass returns q and k of the layers that
are asked for, as the joint attention used them: the text's rows stand in front of the image's, as `ModelOutput.prefix`
says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from haste.errors import UserError
from haste.models.family import ModelOutput
from haste.models.layers import (
    BACKENDS,
    FinalLayer,
    Mlp,
    Modulation,
    PatchEmbedder,
    TimestepEmbedder,
    build_projector,
    check_request,
    check_sizes,
    modulate,
    sincos_positions,
    unpatchify,
)

QueriesKeys = tuple[Tensor, Tensor]


class StreamAttention(nn.Module):
    """One stream's projections to and from the joint attention."""

    def __init__(self, width: int, last_text: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if not last_text:
            self.proj = nn.Linear(width, width)


class Stream(nn.Module):
    """One stream's half of a joint block.

    Args:
        last_text: the text's of the last block, which feeds the attention and ends there: no output projection, no MLP,
            and of the modulation the first two vectors.
    """

    def __init__(self, width: int, mlp_ratio: float, last_text: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = StreamAttention(width, last_text)
        if not last_text:
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if last_text else 6) * width))

    def vectors(self, c: Tensor) -> tuple[Tensor, ...]:
        """The conditioning (B, width) to this half's vectors, (B, width) each, in the order of `Modulation`."""
        return self.adaLN_modulation(c).chunk(self.adaLN_modulation[1].out_features // c.shape[-1], dim=1)

    def qkv(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(B, N, width) to q, k and v side by side, (B, N, 3·width)."""
        return self.attn.qkv(modulate(self.norm1(tokens), shift, scale))

    def mlp_branch(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The MLP output before its gate, (B, N, width)."""
        return self.mlp(modulate(self.norm2(tokens), shift, scale))

    def finish(self, tokens: Tensor, attended: Tensor, m: Modulation) -> Tensor:
        """The next tokens, of the stream's rows of the joint attention's output."""
        tokens = tokens + m.gate_attn.unsqueeze(1) * self.attn.proj(attended)
        return tokens + m.gate_mlp.unsqueeze(1) * self.mlp_branch(tokens, m.shift_mlp, m.scale_mlp)


class JointBlock(nn.Module):
    """Attention over text and image together, then an MLP for each."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, last: bool, attention: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.last = last
        self.attend = BACKENDS[attention]
        self.context_block = Stream(width, mlp_ratio, last_text=last)
        self.x_block = Stream(width, mlp_ratio)

    def attention(self, qkv: Tensor) -> tuple[Tensor, QueriesKeys]:
        """Of the joint q, k, v (B, N, 3·width): the output (B, N, width), and the q and k, (B, H, N, D), behind it."""
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v).transpose(1, 2).flatten(2), (q, k)

    def forward(
        self, text: Tensor, image: Tensor, c: Tensor, keep_queries_keys: bool = False
    ) -> tuple[Tensor, Tensor, QueriesKeys | None]:
        """text (B, L, width), image (B, N, width) and conditioning c (B, width) to the next ones, and q and k of all
        L + N tokens if they are wanted. The last block returns the text as it came.

        Everything goes out by return, so that activation checkpointing may run this twice.
        """
        of_text, of_image, attended, queries_keys = self.attend_jointly(text, image, c)
        if not keep_queries_keys:
            queries_keys = None  # frees the projection before the MLPs need its memory
        length = text.shape[1]
        if not self.last:
            text = self.context_block.finish(text, attended[:, :length], Modulation(*of_text))
        return text, self.x_block.finish(image, attended[:, length:], of_image), queries_keys

    def attend_jointly(
        self, text: Tensor, image: Tensor, c: Tensor
    ) -> tuple[tuple[Tensor, ...], Modulation, Tensor, QueriesKeys | None]:
        """The vectors of both halves, attention's output (B, L + N, width), and the q and k behind it."""
        of_text, of_image = self.context_block.vectors(c), Modulation(*self.x_block.vectors(c))
        qkv = torch.cat([self.context_block.qkv(text, *of_text[:2]),
                         self.x_block.qkv(image, of_image.shift_attn, of_image.scale_attn)], dim=1)  # fmt: skip
        return of_text, of_image, *self.attention(qkv)

    # ---- for caches, as `haste.models.CachedBlock` has it ----

    @property
    def adaLN_modulation(self) -> nn.Sequential:
        """The image's."""
        return self.x_block.adaLN_modulation

    def run(self, streams: tuple[Tensor, Tensor], c: Tensor, image_alone: bool = False) -> tuple[Tensor, Tensor]:
        text, image = streams
        if not image_alone:
            return self(text, image, c)[:2]
        _, of_image, attended, _ = self.attend_jointly(text, image, c)
        return text, self.x_block.finish(image, attended[:, text.shape[1] :], of_image)

    def record(
        self, streams: tuple[Tensor, Tensor], c: Tensor, attention: Tensor, mlp: Tensor
    ) -> tuple[Tensor, Tensor]:
        text, image = streams
        of_text, m, attended, _ = self.attend_jointly(text, image, c)
        length = text.shape[1]
        if not self.last:
            text = self.context_block.finish(text, attended[:, :length], Modulation(*of_text))
        branch = self.x_block.attn.proj(attended[:, length:])
        attention.copy_(branch)
        image = torch.addcmul(image, m.gate_attn.unsqueeze(1), branch)
        branch = self.x_block.mlp_branch(image, m.shift_mlp, m.scale_mlp)
        mlp.copy_(branch)
        return text, torch.addcmul(image, m.gate_mlp.unsqueeze(1), branch)


class MMDiT(nn.Module):
    """A two-stream diffusion transformer that predicts the velocity of an image at time t, given text features.

    Args:
        input_size: side S of the image (or latent).
        patch_size: side of a patch; S must be a multiple of it. N = (S / patch_size)² tokens.
        in_channels: channels C of the image.
        hidden_size: width of both streams, a multiple of 4 and of num_heads; 32·depth in the published models.
        depth: number of joint blocks.
        num_heads: attention heads, of both streams together.
        context_tokens, context_width: the features of one text, (tokens, width). More or fewer tokens are taken, too.
        mlp_ratio: width of the MLPs over hidden_size.
        fused_attn: False computes attention step by step, with its map in memory, whatever `attention` says.
        attention: what computes it: sdpa, flash-attn or xformers.
        encoder_depth: the projectors read the image's tokens after this block, counted from 1.
        z_dims: one projector per entry, onto that many features. Empty: no projector.
        projector_dim: hidden width of the projectors.
        projection_layer_type: "mlp", "conv" or "sra", see `haste.models.layers.build_projector`.

    Attributes:
        null_context: the features (tokens, width) that stand for no text, as of an empty caption; None if they are not
            known. They are no weights: data and checkpoints bring them.

    Raises:
        UserError: sizes that do not fit together.
    """

    family = "mmdit"

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 24,
        num_heads: int = 24,
        context_tokens: int = 77,
        context_width: int = 768,
        mlp_ratio: float = 4.0,
        fused_attn: bool = True,
        attention: str = "sdpa",
        encoder_depth: int = 8,
        z_dims: Sequence[int] = (),
        projector_dim: int = 2048,
        projection_layer_type: str = "mlp",
    ) -> None:
        super().__init__()
        check_sizes({"input_size": input_size, "patch_size": patch_size, "hidden_size": hidden_size, "depth": depth,
                     "num_heads": num_heads})  # fmt: skip
        for name, value in (("context_tokens", context_tokens), ("context_width", context_width)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if z_dims and not 1 <= encoder_depth <= depth:
            raise UserError(f"encoder_depth must be from 1 to the depth, {depth}, got {encoder_depth}")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.context_tokens = context_tokens
        self.context_width = context_width
        self.encoder_depth = encoder_depth
        self.null_context: Tensor | None = None

        # Nothing is zero at first and all weights are torch's own, as in the public trainers. The order is public, too:
        # an optimizer's state counts parameters in it.
        grid = input_size // patch_size
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.context_embedder = nn.Linear(context_width, hidden_size)
        backend = attention if fused_attn else "plain"
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, mlp_ratio, index == depth - 1, backend) for index in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        with torch.random.fork_rng(devices=[]):  # random numbers of a run do not depend on whether there are projectors
            self.projectors = nn.ModuleList(
                build_projector(hidden_size, projector_dim, z, projection_layer_type) for z in z_dims
            )
        self.register_buffer("pos_embed", sincos_positions(hidden_size, grid)[None])

    @property
    def blocks(self) -> nn.ModuleList:
        return self.joint_blocks

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of the images that the model wants outside autocast."""
        return self.x_embedder.proj.weight.dtype

    @property
    def tokens_shape(self) -> tuple[int, int]:
        """(N, width) of one image."""
        return tuple(self.pos_embed.shape[1:])

    def tokens(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) to the image's tokens (B, N, width) with their positions."""
        tokens = self.x_embedder(x)
        return tokens + self.pos_embed.to(tokens.dtype)

    def text(self, context: Tensor) -> Tensor:
        """Text features (B, L, context_width) to the text's tokens (B, L, width)."""
        return self.context_embedder(context.to(self.dtype))

    def streams(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the first block takes: the text's tokens and the image's."""
        return self.text(context), self.tokens(x)

    def prefix(self, context: Tensor | None = None) -> int:
        """The text's tokens, of these features or of those that the model was trained with."""
        return self.context_tokens if context is None else context.shape[1]

    def conditioning(self, t: Tensor, context: Tensor) -> Tensor:
        """t (B,) to what steers every block, (B, width); t (S, 1) to (S, B, width) for the B rows of the context."""
        c = self.t_embedder(t)
        return c if t.dim() == 1 else c.expand(-1, len(context), -1)

    def output(self, tokens: Tensor, c: Tensor) -> ModelOutput:
        """What the model returns when nothing is aligned, made of the image's last tokens and the conditioning."""
        return ModelOutput(self.finish(tokens, c), [], [])

    def finish(self, tokens: Tensor, c: Tensor) -> Tensor:
        """The image's last tokens (B, N, width) and the conditioning to the velocity (B, C, S, S)."""
        return unpatchify(self.final_layer(tokens, c), self.patch_size)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        aligned_layers: Sequence[int] = (),
        project: bool = False,
        tokens_after: int = 0,
    ) -> ModelOutput:
        """The velocity, and on request what alignment with a teacher reads.

        Args:
            x: (B, C, S, S), the image at time t.
            t: (B,), in [0, 1]; 1 is noise.
            context: (B, L, context_width), the features of each image's text.
            aligned_layers: joint blocks, counted from 0, whose q and k, (B, H, L + N, D) each, are returned.
            project: return the projections of the image's tokens after block `encoder_depth`.
            tokens_after: block, counted from 1, whose tokens of the image are returned; 0: none.

        Raises:
            ValueError: a wrong shape, a layer that does not exist, `project` without projectors.
        """
        self._check(x, t, context)
        check_request(len(self.blocks), self.projectors, aligned_layers, project, tokens_after)

        text, image, c = self.text(context), self.tokens(x), self.conditioning(t, context)
        kept: dict[int, QueriesKeys] = {}
        projections: list[Tensor] = []
        hidden: Tensor | None = None
        for index, block in enumerate(self.blocks):
            text, image, queries_keys = block(text, image, c, keep_queries_keys=index in aligned_layers)
            if queries_keys is not None:
                kept[index] = queries_keys
            if index + 1 == tokens_after:
                hidden = image
            if project and index + 1 == self.encoder_depth:
                projections = [projector(image) for projector in self.projectors]
        velocity = self.finish(image, c)
        pairs = [kept[layer] for layer in aligned_layers]
        return ModelOutput(velocity, pairs, projections, prefix=context.shape[1], tokens=hidden)

    def _check(self, x: Tensor, t: Tensor, context: Tensor) -> None:
        wanted = (self.in_channels, self.input_size, self.input_size)
        if x.dim() != 4 or x.shape[1:] != wanted:
            raise ValueError(f"x must have shape (batch, {', '.join(map(str, wanted))}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({x.shape[0]},), as x, got {tuple(t.shape)}")
        if context.dim() != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.context_width:
            raise ValueError(f"context must have shape ({x.shape[0]}, tokens, {self.context_width}), got "
                             f"{tuple(context.shape)}")  # fmt: skip
