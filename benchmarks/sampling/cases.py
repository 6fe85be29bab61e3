"""What is measured: the model's geometry, the batch, its type and device, and the settings of the caches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from haste.errors import UserError
from haste.models import Layout, find_size, get_family

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Geometry:
    """A model, and the images that it makes unless others are asked for.

    model: its config, without the side of its input. pixels: of the image's side per value of what the model samples, 8
    for SD-VAE's latents. cpu_batch: images per run on two processor cores. cfg_scale: of the published table.
    """

    model: dict[str, Any]
    pixels: int
    resolution: int
    cpu_batch: int
    cfg_scale: float = 1.0


IMAGENET = {"in_channels": 4, "num_classes": 1000}
CLIP_L = {"in_channels": 4, "context_tokens": 77, "context_width": 768}
TINY = {"depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "in_channels": 4}


def config_of(name: str, **settings: int) -> dict[str, Any]:
    """Of a published size."""
    family, size = find_size(name)
    return {"family": family.name, **size, **settings}


GEOMETRIES = {
    "SiT-B/2": Geometry(config_of("SiT-B/2", **IMAGENET), pixels=8, resolution=256, cpu_batch=1),
    "SiT-XL/2": Geometry(config_of("SiT-XL/2", **IMAGENET), pixels=8, resolution=256, cpu_batch=1),
    "DiT-S/2": Geometry(config_of("DiT-S/2", **IMAGENET), pixels=8, resolution=256, cpu_batch=1, cfg_scale=1.5),
    "DiT-XL/2": Geometry(config_of("DiT-XL/2", **IMAGENET), pixels=8, resolution=256, cpu_batch=1, cfg_scale=1.5),
    "MM-DiT-COCO": Geometry(config_of("MM-DiT-COCO", **CLIP_L), pixels=8, resolution=256, cpu_batch=1),
    "digits": Geometry(
        config_of("SiT-Digits/2", in_channels=1, num_classes=10), pixels=1, resolution=8, cpu_batch=100
    ),
    # Measure nothing: to see in seconds that the script works on a machine.
    "tiny": Geometry({"family": "sit", **TINY, "num_classes": 10}, pixels=8, resolution=64, cpu_batch=2),
    "tiny DiT": Geometry(
        {"family": "dit", **TINY, "num_classes": 10}, pixels=8, resolution=64, cpu_batch=2, cfg_scale=1.5
    ),
    "tiny MM-DiT": Geometry(
        {"family": "mmdit", **TINY, "context_tokens": 5, "context_width": 24}, pixels=8, resolution=64, cpu_batch=2
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One table of the report. processor_time: seconds are those of the processor, not of the clock."""

    model: str
    resolution: int
    batch: int
    dtype: str
    device: str
    num_steps: int
    interval: int
    order: int
    processor_time: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """Of the model."""
        geometry = GEOMETRIES[self.model]
        return {**geometry.model, "input_size": self.resolution // geometry.pixels}

    @property
    def cfg_scale(self) -> float:
        """Of guidance on the first three channels, both halves in one batch; 1 is none."""
        return GEOMETRIES[self.model].cfg_scale

    @property
    def tokens(self) -> int:
        return (self.config["input_size"] // self.config["patch_size"]) ** 2

    @property
    def layout(self) -> Layout:
        return get_family(self.config).layout(self.config)

    def as_json(self) -> dict[str, Any]:
        text = self.layout.condition_shape
        made = {**asdict(self), "tokens": self.tokens, **({"text_tokens": text[0]} if text else {})}
        if not self.processor_time:
            del made["processor_time"]
        return made if self.cfg_scale == 1 else {**made, "cfg_scale": self.cfg_scale}


def make_case(
    model: str, resolution: int | None, batch: int, dtype: str, device: str, num_steps: int, interval: int, order: int,
    processor_time: bool = False,
) -> Case:  # fmt: skip
    """UserError, in one sentence, for what cannot be measured; what the caches refuse they refuse themselves."""
    if model not in GEOMETRIES:
        raise UserError(f"--model must be one of {', '.join(GEOMETRIES)}, got {model!r}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    geometry = GEOMETRIES[model]
    if resolution is None:
        resolution = geometry.resolution
    unit = geometry.pixels * geometry.model["patch_size"]
    if resolution < unit or resolution % unit:
        raise UserError(f"--resolution must be a multiple of {unit}, such as {geometry.resolution}, got {resolution}")
    for name, value in (("batch-size", batch), ("num-steps", num_steps), ("interval", interval)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    return Case(model, resolution, batch, dtype, device, num_steps, interval, order, processor_time)
