"""xAR as a family: its sizes, its configs, its training steps, and how it is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haste import transport
from haste.errors import UserError
from haste.models.entities import Entities
from haste.models.family import Family, Layout, SamplingCost
from haste.models.registry import register
from haste.models.xar import XAR, check_sizes
from haste.models.xar_checkpoints import XARCheckpoints, infer_config
from haste.samplers import PartCache, Solver
from haste.validation import build, check_limits

XAR_SIZES = {
    "xAR-B": {"depth": 16, "hidden_size": 768, "num_heads": 12, "patch_size": 1},
    "xAR-L": {"depth": 32, "hidden_size": 1024, "num_heads": 16, "patch_size": 1},
    "xAR-H": {"depth": 40, "hidden_size": 1280, "num_heads": 16, "patch_size": 1},
}
"""The published models."""

LARGEST = {
    "width": 16_384, "heads": 1024, "encoder_depth": 200, "decoder_depth": 200, "channels": 4096, "grid": 512,
    "patch_size": 1024, "num_classes": 10_000_000, "align_depth": 400, "projector_dim": 65_536,
}  # fmt: skip


# What a config of the public model's numbers has besides; all but cells_per_side follow from the others.
PUBLIC = {"cells_per_side", "tokens_per_cell", "head_dim", "mlp_ratio", "null_label", "latent_scale"}


@dataclass(frozen=True)
class _Config:
    """The arguments of XAR that a checkpoint holds: all but z_dims. Raises UserError for sizes that no xAR has."""

    width: int
    heads: int
    encoder_depth: int
    decoder_depth: int
    channels: int
    grid: int
    num_classes: int
    mlp_hidden: int | None = None
    patch_size: int = 1
    entity: Literal["token", "cell", "subsample", "scale", "image"] = "cell"
    entity_size: int | None = None
    class_dropout_prob: float = 0.1
    dropout: float = 0.0
    context: Literal["random", "clean", "increasing", "decreasing"] = "random"
    fused_attn: bool = True
    align_depth: int = 8
    projector_dim: int = 2048
    projection_layer_type: Literal["mlp", "conv"] = "mlp"

    def __post_init__(self) -> None:
        check_limits(self, LARGEST)
        if self.mlp_hidden is not None and not 1 <= self.mlp_hidden <= LARGEST["width"] * 16:
            raise UserError(f"mlp_hidden of its model must be from 1 to {LARGEST['width'] * 16}, got {self.mlp_hidden}")


class XARFamily(Family):
    """xAR, conditioned on a class."""

    name = "xar"
    title = "xAR"
    foreign = XARCheckpoints()
    settings = {"entity": "cell", "entity_size": None, "context": "random", "dropout": 0.1}
    in_parts = True
    sizes = {
        **XAR_SIZES,
        # 8 x 8 pixels as 4 x 4 tokens: the parameters of SiT-Digits/2.
        "xAR-Digits": {"depth": 6, "hidden_size": 96, "num_heads": 4, "patch_size": 2},
    }

    def build(self, config: dict[str, Any], z_dims: Sequence[int] = ()) -> XAR:
        unknown = config.keys() - _Config.__dataclass_fields__.keys() - PUBLIC
        if unknown:
            known = ", ".join(_Config.__dataclass_fields__)
            raise UserError(f"config of an xAR must have names of {known}, got {min(unknown)}")
        return XAR(**_own_names(config), z_dims=z_dims)

    def config_for(self, size: Mapping[str, Any], settings: Any, data: Any) -> dict[str, Any]:
        if data.input_size % size["patch_size"]:
            raise UserError(f"the side of the model's input must be a multiple of --patch-size, {size['patch_size']}, "
                            f"got {data.input_size}")  # fmt: skip
        if settings.attention != "sdpa":
            raise UserError(f"--attention must be sdpa for xAR, got {settings.attention}")
        if settings.qk_norm:
            raise UserError("--qk-norm must be left out for xAR, whose published models have none, got True")
        if settings.context == "clean" and settings.aligns_attention:
            raise UserError("--attn-coeff must be 0 with --context clean, whose maps join two streams, got "
                            f"{settings.attn_coeff:g}")  # fmt: skip
        grid = data.input_size // size["patch_size"]
        entities = Entities(settings.entity, grid, settings.entity_size)
        if settings.teacher_grid == "interpolate-student" and settings.aligns_attention and entities.causal:
            raise UserError("--teacher-grid must be match or interpolate for the block-causal attention of xAR, got "
                            "interpolate-student")  # fmt: skip
        encoder_depth = size["depth"] - size["depth"] // 2
        check_sizes(size["hidden_size"], size["num_heads"], encoder_depth, size["depth"] // 2)
        return {
            "width": size["hidden_size"],
            "heads": size["num_heads"],
            "encoder_depth": encoder_depth,
            "decoder_depth": size["depth"] // 2,
            "channels": data.channels,
            "grid": grid,
            "patch_size": size["patch_size"],
            "entity": settings.entity,
            "entity_size": entities.size,
            "num_classes": data.num_classes,
            "class_dropout_prob": settings.cfg_prob,
            "dropout": settings.dropout,
            "context": settings.context,
            "fused_attn": settings.fused_attn,
            "align_depth": settings.encoder_depth,
            "projector_dim": settings.projector_dim,
            "projection_layer_type": settings.projection_layer_type,
        }

    def checked(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        given = asdict(build(_Config, _own_names(config), f"model_config of {source}"))
        return {name: value for name, value in given.items() if name in _own_names(config)}

    def check_start(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> None:
        """Learned positions are of places, so they fit no other order of the tokens."""
        own, found = _entities(_own_names(config)), _entities(_own_names(other))
        if own.grid == found.grid and not torch.equal(own.order, found.order):
            wanted = f"{found.kind} with --entity-size {found.size}"
            raise UserError(f"--entity must be {wanted}, in whose order the positions of --init-from are, got "
                            f"{own.kind} with {own.size}")  # fmt: skip

    def depth(self, size: Mapping[str, Any]) -> int:
        return size["depth"] if "depth" in size else size["encoder_depth"] + size["decoder_depth"]

    def layout(self, config: Mapping[str, Any]) -> Layout:
        config = _own_names(config)
        entities, channels = _entities(config), config["channels"]
        side, values = entities.grid * entities.patch_size, channels * entities.patch_size**2
        sequence = (entities.total, values) if entities.prefix else None
        return Layout((channels, side, side), entities.grid, self.depth(config), config["heads"],
                      config["num_classes"], entities.count, sequence)  # fmt: skip

    def for_sampling(self, config: Mapping[str, Any], fused_attn: bool = True) -> dict[str, Any]:
        return {**config, "fused_attn": fused_attn}

    def training_flops(self, config: Mapping[str, Any]) -> int:
        """Those of the matrix products: forward, and twice that for backward; of attention what the mask leaves."""
        from haste.models.xar_costs import modulation_flops, network_flops

        with torch.device("meta"):
            model = self.build(_own_names(config))
        entities = model.entities
        return 3 * (network_flops(model, 0, entities.sizes) + entities.count * modulation_flops(model))

    def size_name(self, config: Mapping[str, Any]) -> str:
        shape = (config["width"], config["heads"], self.depth(config), config.get("patch_size", 1))
        for name, size in self.sizes.items():
            if shape == (size["hidden_size"], size["num_heads"], size["depth"], size["patch_size"]):
                return name
        return f"an xAR of depth {shape[2]}, width {shape[0]}, heads {shape[1]}, patch size {shape[3]}"

    # ---- a training step ----

    def null(self, model: nn.Module) -> Tensor | None:
        return None if model.null_label is None else torch.tensor(model.null_label)

    def sample_times(
        self,
        model: nn.Module,
        batch: int,
        weighting: str,
        path: str,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(batch, K), one for each entity; the paper's sigmoid(N(0, 1)) is lognormal on the linear path."""
        count = batch * model.entities.count
        t = transport.sample_time(count, weighting, path, device=device, generator=generator).view(batch, -1)
        if model.context in ("increasing", "decreasing"):
            return t.sort(dim=1, descending=model.context == "decreasing").values
        return t

    def noise_shape(self, model: nn.Module, x: Tensor) -> tuple[int, ...]:
        entities: Entities = model.entities
        return (len(x), entities.total, model.z_proj.in_features) if entities.prefix else tuple(x.shape)

    def interpolate(self, model: nn.Module, x: Tensor, noise: Tensor, t: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """As sequences for entities that hold more than the image's tokens; the clean stream after x_t if there is
        one."""
        entities: Entities = model.entities
        t = t if t.dim() == 2 else t[:, None].expand(-1, entities.count)
        per_place = entities.spread(t)[:, :, None]
        if entities.prefix:
            x = entities.split(x)
        else:
            values = model.z_proj.in_features
            per_place = entities.join(per_place.expand(-1, -1, values))  # (B, C, S, S)
        x_t, target = transport.interpolate(x, noise, per_place, path)
        if model.context == "clean":
            x_t = torch.cat([x_t, x], dim=-1 if x.dim() == 3 else 1)
        return x_t, target

    # ---- sampling ----

    def sample(self, model: nn.Module, noise: Tensor, condition: Tensor, solve: Solver) -> Tensor:
        """Entity by entity, or staggered, as `solve` has it; see xar_sampling.py."""
        return model.sample_in_parts(noise, condition, solve)

    def sampling_cost(
        self, model: nn.Module, solve: Solver, images: int, cache: PartCache | None = None
    ) -> SamplingCost:
        from haste.models.xar_costs import cache_bytes, count_flops

        counted = count_flops(model, solve, cache=cache)
        return SamplingCost(counted.flops, cache_bytes(model, images, guided=solve.cfg_scale > 1))

    # ---- files of others ----

    def infer_config(self, weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any] | None:
        heads = {size["hidden_size"]: size["num_heads"] for size in XAR_SIZES.values()}
        return infer_config(weights, args, heads)


def _entities(config: Mapping[str, Any]) -> Entities:
    return Entities(
        config.get("entity", "cell"), config["grid"], config.get("entity_size"), config.get("patch_size", 1)
    )


def _own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the public model's numbers, which names cells by their number along a side, as XAR's arguments."""
    own = {name: value for name, value in config.items() if name in _Config.__dataclass_fields__}
    if "cells_per_side" in config:
        cells, grid = config["cells_per_side"], config["grid"]
        if not isinstance(cells, int) or cells < 1 or grid % cells:
            raise UserError(f"cells_per_side must divide the {grid} tokens along a side of the image, got {cells}")
        own["entity_size"] = grid // cells
    return own


register(XARFamily())
