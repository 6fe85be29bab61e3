"""xAR (arXiv 2502.20388): entities of an image, one after the other, each by flow matching given the ones before it.

The names of its parameters are those of the public checkpoints. Time runs from t = 1 (noise) to t = 0 (data), and each
entity has a time of its own. Tokens are in the order of `haste.models.entities`; a token sees those of its own entity
and of earlier ones, both while training, where all are noisy, and while sampling (xar_sampling.py).

Reading order: Geometry, Attention, Mlp, XARBlock, XAR.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from haste.errors import UserError
from haste.models.entities import Entities
from haste.models.family import ModelOutput
from haste.models.layers import (
    RMSNorm,
    TimestepEmbedder,
    build_projector,
    check_request,
    initialize_linear,
    rms_norm,
    rotate,
)
from haste.models.xar_checkpoints import add_public_buffers, drop_public_buffers
from haste.samplers import PartCache, Solver

if TYPE_CHECKING:
    from haste.models.xar_sampling import Replays

QueriesKeys = tuple[Tensor, Tensor]

# Attention is one call per entity, which computes no masked product, unless that makes more calls than it saves.
MOST_CALLS, LEAST_TOKENS = 16, 32

CONTEXTS = ("random", "clean", "increasing", "decreasing")


class Geometry(NamedTuple):
    """What attention and modulation know of a sequence, the same for all blocks.

    cos, sin: (N, D/2), of the rotation of q and k. bounds: of the entities. owner: (N,), the entity of each token,
    where entities differ in size, else None. mask: (N, N) bool, what sees what; None if a call for each entity does
    instead.
    """

    cos: Tensor
    sin: Tensor
    bounds: list[tuple[int, int]]
    owner: Tensor | None
    mask: Tensor | None


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, width) tokens with rotary positions, block-causal over entities."""

    def __init__(self, width: int, num_heads: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.fused = fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, geometry: Geometry) -> tuple[Tensor, QueriesKeys]:
        """Returns the output (B, N, width) and the rotated q and k, each (B, H, N, D), that made it."""
        q, k, v = self.project(tokens, geometry.cos, geometry.sin)
        out = self._attend(q, k, v, geometry)
        return self.finish(out), (q, k)

    def project(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k, rotated, and v, each (B, H, N, D)."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], cos, sin).to(qkv.dtype).unbind(0)
        return q, k, qkv[2]

    def finish(self, out: Tensor) -> Tensor:
        """Heads (B, H, N, D) to the output (B, N, width)."""
        return F.dropout(self.proj(out.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
        if geometry.mask is not None:
            return self.sdpa(q, k, v, geometry.mask)
        parts = [self.sdpa(q[:, :, lo:hi], k[:, :, :hi], v[:, :, :hi]) for lo, hi in geometry.bounds]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout)


class Mlp(nn.Module):
    """fc2(GELU(fc1_g x) ⊙ fc1_x x), the GELU exact."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gated = F.dropout(F.gelu(self.fc1_g(tokens)) * self.fc1_x(tokens), self.dropout, self.training)
        return F.dropout(self.fc2(gated), self.dropout, self.training)


class XARBlock(nn.Module):
    """Attention, then MLP, each behind an RMS norm that the condition scales and shifts, and in front of a gate."""

    def __init__(self, width: int, num_heads: int, mlp_hidden: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads, dropout, fused)
        self.mlp = Mlp(width, mlp_hidden, dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, tokens: Tensor, c: Tensor, geometry: Geometry, keep_queries_keys: bool = False
    ) -> tuple[Tensor, QueriesKeys | None]:
        """tokens (B, N, width) and the condition of each entity (B, K, width) to the next tokens, and q and k if they
        are wanted."""
        modulation = self.ada_lin(c)
        if geometry.owner is not None:
            modulation = modulation[:, geometry.owner]
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unsqueeze(2).chunk(6, dim=-1)
        groups = (modulation.shape[1], -1)  # tokens that share a modulation
        x = torch.addcmul(shift1, rms_norm(tokens).unflatten(1, groups), 1 + scale1).flatten(1, 2)
        queries_keys: QueriesKeys | None
        branch, queries_keys = self.attn(x, geometry)
        if not keep_queries_keys:
            queries_keys = None  # frees the projection before the MLP needs its memory
        tokens = torch.addcmul(tokens.unflatten(1, groups), gate1, branch.unflatten(1, groups)).flatten(1, 2)
        x = torch.addcmul(shift2, rms_norm(tokens).unflatten(1, groups), 1 + scale2).flatten(1, 2)
        branch = self.mlp(x).unflatten(1, groups)
        return torch.addcmul(tokens.unflatten(1, groups), gate2, branch).flatten(1, 2), queries_keys


class XAR(nn.Module):
    """Predicts the velocity of every entity of an image, each at its own time, given the class and earlier entities.

    Args:
        width: of the tokens, a multiple of 4·heads.
        heads: of attention.
        encoder_depth, decoder_depth: blocks in front of `encoder_norm`, and after it.
        mlp_hidden: width of the MLP; None for int(width·4·2/3).
        channels: C of an image or latent.
        grid: tokens along a side of it.
        patch_size: pixels or latents along a side of a token; 1 in the paper.
        entity, entity_size: see `haste.models.entities`.
        num_classes: without the null class, number num_classes.
        class_dropout_prob: how often training drops the class; with 0 there is no null class.
        dropout: in training mode, of attention's probabilities, of its output, and twice in the MLP.
        context: what an entity sees of earlier ones while training. random: noise at times of their own. increasing,
            decreasing: at times that rise, or fall, from entity to entity. clean: none, in a second stream of tokens.
        fused_attn: False computes attention step by step.
        align_depth: the projectors read the tokens after this block, counted from 1.
        z_dims: one projector per entry, onto that many features.
        projector_dim: hidden width of the projectors.
        projection_layer_type: "mlp" or "conv", see `haste.models.layers.build_projector`.

    Attributes:
        entities: the layout of the tokens.
        replays: the CUDA graphs of sampling; None before `capture`.

    Raises:
        UserError: sizes that do not fit together.
    """

    family = "xar"

    def __init__(
        self,
        width: int = 768,
        heads: int = 12,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        mlp_hidden: int | None = None,
        channels: int = 16,
        grid: int = 16,
        patch_size: int = 1,
        entity: str = "cell",
        entity_size: int | None = None,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        dropout: float = 0.0,
        context: str = "random",
        fused_attn: bool = True,
        align_depth: int = 8,
        z_dims: Sequence[int] = (),
        projector_dim: int = 2048,
        projection_layer_type: str = "mlp",
    ) -> None:
        super().__init__()
        check_sizes(width, heads, encoder_depth, decoder_depth)
        check_settings(channels, grid, patch_size, num_classes, class_dropout_prob, dropout, context)
        depth = encoder_depth + decoder_depth
        if z_dims and not 1 <= align_depth <= depth:
            raise UserError(f"align_depth must be from 1 to the depth, {depth}, got {align_depth}")
        self.heads, self.channels = heads, channels
        self.num_classes, self.context, self.align_depth = num_classes, context, align_depth
        self.row_by_row = projection_layer_type == "conv"  # what the projectors want
        self.null_label = num_classes if class_dropout_prob > 0 else None
        self.entities = Entities(entity, grid, entity_size, patch_size)
        self._geometries: dict[tuple, Geometry] = {}
        self.replays: Replays | None = None
        hidden = int(width * 4 * 2 / 3) if mlp_hidden is None else mlp_hidden

        places, values = self.entities.total, channels * patch_size**2
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, width))
        self.class_emb = nn.Embedding(num_classes + (class_dropout_prob > 0), width)
        self.time_embed = TimestepEmbedder(width)
        self.z_proj = nn.Linear(values, width)
        self.z_proj_ln = RMSNorm(width)
        self.encoder_blocks = nn.ModuleList(
            XARBlock(width, heads, hidden, dropout, fused_attn) for _ in range(encoder_depth)
        )
        self.encoder_norm = RMSNorm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList(
            XARBlock(width, heads, hidden, dropout, fused_attn) for _ in range(decoder_depth)
        )
        self.decoder_norm = RMSNorm(width)
        self.pred = nn.Linear(width, values)
        with torch.random.fork_rng(devices=[]):  # the trunk's weights do not depend on whether there are projectors
            self.projectors = nn.ModuleList(
                build_projector(width, projector_dim, z, projection_layer_type) for z in z_dims
            )
        self._initialize()
        self.register_state_dict_post_hook(add_public_buffers)
        self.register_load_state_dict_pre_hook(drop_public_buffers)

    def _initialize(self) -> None:
        """Xavier on linear maps, normal(0.02) on the embeddings; the projectors last, for the same trunk with them."""
        for name, part in self.named_children():
            if name != "projectors":
                part.apply(initialize_linear)
        for table in (self.class_emb.weight, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=0.02)
        self.projectors.apply(initialize_linear)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, and of the images that the model wants outside autocast."""
        return self.z_proj.weight.dtype

    @property
    def blocks(self) -> list[XARBlock]:
        """All of them in order: the encoder's, then the decoder's."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    # ---- parts of the forward pass ----

    def conditioning(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B, K) and classes y (B,) to what steers every block, (B, K, width).

        The embedded time is int(1000·t), of the float32 product, as in the public code.
        """
        steps = (1000 * t.float()).int().to(torch.promote_types(self.dtype, torch.float32))
        return self.class_emb(y)[:, None] + self.time_embed(steps)

    @cached_property
    def frequencies(self) -> Tensor:
        """Of the rotation, (n,) float64: 10000^(−j/n), j < n = head dim / 4."""
        n = self.z_proj.out_features // self.heads // 4
        return 10000.0 ** (-torch.arange(n, dtype=torch.float64, device="cpu") / n)

    @cached_property
    def angles(self) -> Tensor:
        """Of the rotation, (N, head dim / 2) float64: of rows, then of columns."""
        return (self.entities.coordinates[:, :, None] * self.frequencies).flatten(1)

    def rotary(self, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """cos and sin (N, head dim / 2) of all places, of at least float32."""
        dtype = torch.promote_types(dtype, torch.float32)
        return self.angles.cos().to(device, dtype), self.angles.sin().to(device, dtype)

    def embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens (B, n, C·patch²) at the places from `first` on to (B, n, width): z_proj, positions, norm."""
        positions = self.encoder_pos_embed_learned[:, first : first + tokens.shape[1]]
        return self.z_proj_ln(self.z_proj(tokens) + positions)

    def enter_decoder(self, tokens: Tensor, first: int = 0) -> Tensor:
        """What stands between the encoder's last block and the decoder's first one."""
        positions = self.decoder_pos_embed_learned[:, first : first + tokens.shape[1]]
        return self.decoder_embed(self.encoder_norm(tokens)) + positions

    def finish(self, tokens: Tensor) -> Tensor:
        """The last tokens (B, n, width) to velocities (B, n, C·patch²)."""
        return self.pred(self.decoder_norm(tokens))

    def _project(self, image: Tensor) -> list[Tensor]:
        """The projections of the image's tokens, in the same order."""
        if not self.row_by_row:
            return [projector(image) for projector in self.projectors]
        rows, order = image[:, self.entities.on("inverse", image.device)], self.entities.on("order", image.device)
        return [projector(rows)[:, order] for projector in self.projectors]

    def _geometry(self, device: torch.device, streams: int) -> Geometry:
        """Made once for each device, type and number of streams."""
        key = (device, self.dtype, streams)
        if key not in self._geometries:
            with torch.inference_mode(False):  # training may use it, too
                self._geometries[key] = self._make_geometry(device, streams)
        return self._geometries[key]

    def _make_geometry(self, device: torch.device, streams: int) -> Geometry:
        entities = self.entities
        cos, sin = (table.repeat(streams, 1) for table in self.rotary(self.dtype, device))
        owners = [entities.on("owner", device) + stream * entities.count for stream in range(streams)]
        owner = None if len(set(entities.sizes)) == 1 else torch.cat(owners)
        calls = entities.count == 1 or (entities.count <= MOST_CALLS and min(entities.sizes) >= LEAST_TOKENS)
        mask = None if calls else entities.visible
        mask = _two_streams(entities) if streams == 2 else mask
        return Geometry(cos, sin, entities.bounds, owner, None if mask is None else mask.to(device))

    # ---- the forward pass ----

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
            x: (B, C, S, S), or the sequence (B, N, C·patch²) of `entities.split`; each entity at its own time. With
                twice the channels (values of a token) the second half is the clean image that earlier entities are
                seen of.
            t: (B, K), or (B,) for one time for all; in [0, 1]; 1 is noise.
            y: (B,), int64, classes.
            aligned_layers: blocks, counted from 0, whose q and k are returned, in the order of places.
            project: return the projections of the tokens after block `align_depth`, in the same order.
            tokens_after: block, counted from 1, whose tokens of the image are returned; 0: none.

        Returns:
            The velocity is shaped as x, without its second half.

        Raises:
            ValueError: a wrong shape, a layer that does not exist, `project` without projectors.
        """
        check_request(len(self.blocks), self.projectors, aligned_layers, project, tokens_after)
        streams, t = self._check_inputs(x, t, y)
        own = self._sequences(x, streams)
        geometry = self._geometry(x.device, len(own))
        places = self.entities.total
        tokens = torch.cat([self.embed(sequence) for sequence in own], dim=1)
        c = self.conditioning(torch.cat([t, torch.zeros_like(t)], dim=1) if streams == 2 else t, y)

        kept: dict[int, QueriesKeys] = {}
        projections: list[Tensor] = []
        hidden: Tensor | None = None
        for index, block in enumerate(self.blocks):
            if index == len(self.encoder_blocks):
                tokens = torch.cat([self.enter_decoder(part) for part in tokens.split(places, dim=1)], dim=1)
            tokens, queries_keys = block(tokens, c, geometry, keep_queries_keys=index in aligned_layers)
            if queries_keys is not None:
                q, k = queries_keys
                kept[index] = (q[:, :, :places], k[:, :, :places])
            if index + 1 == tokens_after:
                hidden = tokens[:, self.entities.prefix : places]
            if project and index + 1 == self.align_depth:
                projections = self._project(tokens[:, self.entities.prefix : places])
        velocity = self.finish(tokens[:, :places])
        velocity = velocity if x.dim() == 3 else self.entities.join(velocity)
        entities = self.entities
        return ModelOutput(
            velocity, [kept[layer] for layer in aligned_layers], projections, entities.prefix, entities.causal,
            entities.on("order", x.device), hidden,
        )  # fmt: skip

    def capture(self) -> XAR:
        """Replay evaluations of sampling as CUDA graphs from now on, each captured when it is first made.

        Raises:
            UserError: the model is on no GPU.
        """
        from haste.models.xar_sampling import Replays  # which is built on this file

        device = self.z_proj.weight.device
        if device.type != "cuda":
            raise UserError(f"the model must be on a GPU for CUDA graphs, got {device}")
        self.replays = Replays()
        return self

    def sample_in_parts(
        self, noise: Tensor, condition: Tensor, solve: Solver, cache: PartCache | None = None
    ) -> Tensor:
        """Images (B, C, S, S) of noise; see `haste.models.xar_sampling.sample_parts`."""
        from haste.models.xar_sampling import sample_parts  # which is built on this file

        return sample_parts(self, noise, condition, solve, cache)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[int, Tensor]:
        """The number of streams, and t as (B, K)."""
        entities, values = self.entities, self.z_proj.in_features
        side = entities.grid * entities.patch_size
        single, double = (
            ((n * self.channels, side, side), (entities.total, n * values)) for n in (1, 2)
        )  # images and sequences of one stream, and of two
        shape = tuple(x.shape[1:])
        if shape not in (*single, *double):
            wanted = f"(batch, {', '.join(map(str, single[0]))}) or (batch, {', '.join(map(str, single[1]))})"
            raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
        if t.shape not in (x.shape[:1], (len(x), entities.count)):
            raise ValueError(f"t must have shape ({len(x)},) or ({len(x)}, {entities.count}), got {tuple(t.shape)}")
        if y.shape != x.shape[:1]:
            raise ValueError(f"y must have shape ({len(x)},), as x, got {tuple(y.shape)}")
        return 1 + (shape in double), t if t.dim() == 2 else t[:, None].expand(-1, entities.count)

    def _sequences(self, x: Tensor, streams: int) -> list[Tensor]:
        """The tokens of each stream."""
        if x.dim() == 3:
            return list(x.chunk(streams, dim=2))
        return [self.entities.split(part) for part in x.chunk(streams, dim=1)]


def _two_streams(entities: Entities) -> Tensor:
    """(2N, 2N) bool: a noisy entity sees itself and the clean ones before it; a clean one as while sampling."""
    visible, own = entities.visible, entities.owner[:, None] == entities.owner[None, :]
    return torch.cat([torch.cat([own, visible & ~own], dim=1), torch.cat([torch.zeros_like(own), visible], dim=1)])


def check_sizes(width: int, heads: int, encoder_depth: int, decoder_depth: int) -> None:
    for name, value in (("hidden-size", width), ("num-heads", heads)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if min(encoder_depth, decoder_depth) < 1:
        parts = f"{encoder_depth} and {decoder_depth}"
        raise UserError(f"--depth must be at least 2, a block of the encoder and one of the decoder, got {parts}")
    if width % (4 * heads):
        raise UserError(f"--hidden-size must be a multiple of 4 for each of {heads} heads, for positions, got {width}")


def check_settings(
    channels: int,
    grid: int,
    patch_size: int,
    num_classes: int,
    class_dropout_prob: float,
    dropout: float,
    context: str,
) -> None:
    sizes = {"channels": channels, "grid": grid, "patch_size": patch_size, "num_classes": num_classes}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    for name, share in (("class_dropout_prob", class_dropout_prob), ("dropout", dropout)):
        if not 0 <= share < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {share}")
    if context not in CONTEXTS:
        raise UserError(f"context must be one of {', '.join(CONTEXTS)}, got {context!r}")
