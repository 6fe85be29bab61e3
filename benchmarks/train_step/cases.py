"""What is measured: the geometry of student and teacher, batch, precision and device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from haste.alignment import LayerMap, choose_layer_map
from haste.errors import UserError
from haste.models import find_size

PIXELS_PER_LATENT = 8
PRECISIONS = ("no", "bf16")
PROJ_COEFF = ATTN_COEFF = 0.5


@dataclass(frozen=True)
class Geometry:
    """A student, which of its layers learn from which of the teacher's, and the teacher's config.

    student: a config of its family, without the side of its input. teacher: arguments of transformers' Dinov2Config; {}
    is DINOv2-B, and so is its patch. cpu_batch: images per step on two processor cores, at 256 tokens.
    """

    student: dict[str, Any]
    layer_map: LayerMap
    teacher: dict[str, Any]
    cpu_batch: int


def paper_geometry(model: str, encoder_depth: int, cpu_batch: int) -> Geometry:
    """HASTE's for this model (arXiv 2505.16792), at 256 and 512 pixels, with DINOv2-B."""
    family, size = find_size(model)
    student = {"family": family.name, **size, "in_channels": 4, "encoder_depth": encoder_depth}
    if family.name == "mmdit":
        student |= {"context_tokens": 77, "context_width": 768}  # of CLIP-L
    return Geometry(student, choose_layer_map("", model), {"image_size": 518, "patch_size": 14}, cpu_batch)


def tiny_geometry(**student: Any) -> Geometry:
    return Geometry(
        {"depth": 3, "hidden_size": 48, "num_heads": 4, "patch_size": 2, "in_channels": 4, "encoder_depth": 2,
         "projector_dim": 32, **student},
        LayerMap((0, 1), (1, 2)),
        {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 56, "patch_size": 14},
        cpu_batch=2,
    )  # fmt: skip


GEOMETRIES = {
    "SiT-B/2": paper_geometry("SiT-B/2", encoder_depth=5, cpu_batch=2),
    "SiT-L/2": paper_geometry("SiT-L/2", encoder_depth=8, cpu_batch=1),
    "SiT-XL/2": paper_geometry("SiT-XL/2", encoder_depth=8, cpu_batch=1),
    "MM-DiT-COCO": paper_geometry("MM-DiT-COCO", encoder_depth=8, cpu_batch=1),
    # Measure nothing: to see in seconds that the script works on a machine.
    "tiny": tiny_geometry(family="sit"),
    "tiny MM-DiT": tiny_geometry(family="mmdit", context_tokens=5, context_width=24),
}

CUDA_BATCH = 32  # the paper's 256 over eight devices


@dataclass(frozen=True)
class Case:
    """One table of the report."""

    model: str
    resolution: int
    batch: int
    precision: str
    device: str

    @property
    def geometry(self) -> Geometry:
        return GEOMETRIES[self.model]

    @cached_property
    def student(self) -> dict[str, Any]:
        """The config, but for its projectors."""
        classes = {"num_classes": 1000} if self.geometry.student["family"] == "sit" else {}
        return {**classes, **self.geometry.student, "input_size": self.resolution // PIXELS_PER_LATENT}

    @property
    def grid(self) -> int:
        return self.student["input_size"] // self.student["patch_size"]

    @property
    def text_shape(self) -> tuple[int, int] | None:
        """(tokens, width) of the features of a caption; None for a model of classes."""
        student = self.student
        return (student["context_tokens"], student["context_width"]) if "context_tokens" in student else None

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def as_json(self) -> dict[str, Any]:
        text = {"text_tokens": self.text_shape[0]} if self.text_shape else {}
        return {**asdict(self), "tokens": self.grid**2, **text, "layer_map": str(self.geometry.layer_map)}


def make_case(model: str, resolution: int, batch: int | None, precision: str, device: str) -> Case:
    """UserError, in one sentence, for what cannot be measured."""
    if model not in GEOMETRIES:
        raise UserError(f"--model must be one of {', '.join(GEOMETRIES)}, got {model!r}")
    if precision not in PRECISIONS:
        raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    step = PIXELS_PER_LATENT * GEOMETRIES[model].student["patch_size"]
    if resolution < step or resolution % step:
        raise UserError(f"--resolution must be a multiple of {step}, such as 256, got {resolution}")
    if batch is None:
        batch = CUDA_BATCH if device == "cuda" else GEOMETRIES[model].cpu_batch
    if batch < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch}")
    return Case(model, resolution, batch, precision, device)
