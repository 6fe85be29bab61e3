"""The arguments of SiT as a checkpoint keeps them, held against what any SiT can have."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from haste.errors import UserError
from haste.models.sit import SiT
from haste.plain import build

# Far above what anybody trains, and far below what no machine can hold.
LARGEST = {
    "input_size": 8192, "patch_size": 1024, "in_channels": 4096, "hidden_size": 16_384, "depth": 200,
    "num_heads": 1024, "num_classes": 10_000_000, "encoder_depth": 200, "projector_dim": 65_536,
}  # fmt: skip
MOST_TOKENS = 2**18


@dataclass(frozen=True)
class ModelConfig:
    """As `SiT` has them, without z_dims. Raises UserError for sizes that no SiT has."""

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
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if not 1 <= value <= largest:
                raise UserError(f"{name} of its model must be 1 to {largest}, and is {value}")
        if (self.input_size // self.patch_size) ** 2 > MOST_TOKENS:
            raise UserError(f"its model must have {MOST_TOKENS} tokens at most, and has {self.input_size} / "
                            f"{self.patch_size} along a side")  # fmt: skip
        if not 1 / 64 <= self.mlp_ratio <= 64:
            raise UserError(f"mlp_ratio of its model must be 1/64 to 64, and is {self.mlp_ratio}")


def checked(values: Any, source: str) -> dict[str, Any]:
    """The arguments of SiT among `values`; UserError, naming `source`, if one is missing or none that SiT can have."""
    given = asdict(build(ModelConfig, values, f"model_config of {source}"))
    return {name: given[name] for name in (field.name for field in fields(ModelConfig)) if name in values}


def on_meta(model_config: dict[str, Any]) -> SiT:
    """The model without memory for its weights. UserError for sizes that do not fit together."""
    with torch.device("meta"):
        return SiT(**model_config, z_dims=())
