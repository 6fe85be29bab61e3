"""The ways to make one training step, on one set of weights.

All contenders of a case share their weights and AdamW's moments, so that those of SiT-XL/2 fit beside each other; each
has its own model, optimizer and aligner around them. EMA is left out: it costs all of them the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from cases import ATTN_COEFF, PROJ_COEFF, Case
from eager import EagerAligner, materialise_maps
from haste.alignment import Aligner
from haste.models import build_model
from haste.teachers import TeacherOutput, VisionTeacher
from haste.transport import interpolate, sample_time, velocity_loss
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model


@dataclass(frozen=True)
class Variant:
    """teacher_runs: else what it would say is handed in. stopped: the state after τ."""

    name: str
    proj_coeff: float = 0.0
    attn_coeff: float = 0.0
    teacher_runs: bool = False
    eager: bool = False
    stopped: bool = False

    @property
    def aligned(self) -> bool:
        return self.proj_coeff != 0 or self.attn_coeff != 0

    @property
    def released(self) -> bool:
        """At τ the trainer builds the model anew, without projectors, and frees the teacher."""
        return self.stopped and not self.eager


VANILLA, AGAIN, HASTE, ATTENTION, REPA, STOPPED, WITH_TEACHER, EAGER, EAGER_STOPPED = VARIANTS = (
    Variant("vanilla"),
    Variant("vanilla, again"),
    Variant("HASTE", PROJ_COEFF, ATTN_COEFF),
    Variant("L_A alone", 0.0, ATTN_COEFF),
    Variant("REPA", PROJ_COEFF, 0.0),
    Variant("HASTE after τ", PROJ_COEFF, ATTN_COEFF, stopped=True),
    Variant("HASTE, teacher included", PROJ_COEFF, ATTN_COEFF, teacher_runs=True),
    Variant("eager", PROJ_COEFF, ATTN_COEFF, eager=True),
    Variant("eager after τ", PROJ_COEFF, ATTN_COEFF, eager=True, stopped=True),
)


@dataclass
class Batch:
    """What is diffused (B, C, S, S), what the teacher looks at (B, 3, R, R) in [-1, 1], and the classes (B,) or the
    features of captions (B, tokens, width)."""

    latents: Tensor
    images: Tensor
    condition: Tensor


def make_batch(case: Case) -> Batch:
    side = case.student["input_size"]
    latents = torch.randn(case.batch, 4, side, side, device=case.device)
    images = 2 * torch.rand(case.batch, 3, case.resolution, case.resolution, device=case.device) - 1
    if case.text_shape:
        return Batch(latents, images, torch.randn(case.batch, *case.text_shape, device=case.device))
    return Batch(latents, images, torch.randint(1000, (case.batch,), device=case.device))


def make_teacher(case: Case) -> VisionTeacher:
    """A DINOv2 with random weights, by the path that a downloaded one takes."""
    with TemporaryDirectory() as folder:
        Dinov2Model(Dinov2Config(**case.geometry.teacher)).save_pretrained(Path(folder))
        teacher = VisionTeacher.from_pretrained(folder, case.geometry.layer_map.teacher, case.grid)
    return teacher.to(case.device)


class GivenTeacher(nn.Module):
    """A teacher that returns the same output at every step and takes no time."""

    def __init__(self, said: TeacherOutput, variant: Variant) -> None:
        super().__init__()
        self.width = said.patch_tokens.shape[-1]
        self.said = TeacherOutput(
            said.queries_keys if variant.attn_coeff else [],
            said.prefix,
            said.patch_tokens if variant.proj_coeff else None,
        )

    def forward(self, images: Tensor) -> TeacherOutput:
        return self.said

    def tensors(self) -> list[Tensor]:
        tensors = [*(x for pair in self.said.queries_keys for x in pair), self.said.patch_tokens]
        return [x for x in tensors if x is not None]


def random_output(case: Case, teacher: VisionTeacher, batch: Batch) -> TeacherOutput:
    """Random numbers in the shapes, types and layout of what the teacher says: random weights would say too little."""
    with case.autocast():
        said = teacher(batch.images)
    queries_keys = [(torch.randn_like(q), torch.randn_like(k)) for q, k in said.queries_keys]
    return TeacherOutput(queries_keys, said.prefix, torch.randn_like(said.patch_tokens))


class Contender:
    """One variant's training step, as the trainer makes it."""

    def __init__(self, variant: Variant, case: Case, batch: Batch, model: nn.Module, aligner: nn.Module | None) -> None:
        self.variant = variant
        self.case = case
        self.batch = batch
        self.model = model.train()
        self.aligner = aligner
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def loss(self) -> Tensor:
        batch, aligner = self.batch, self.aligner
        noise = torch.randn_like(batch.latents)
        t = sample_time(len(noise), device=noise.device)
        x_t, target = interpolate(batch.latents, noise, t)
        with self.case.autocast():
            if aligner is None:
                output = self.model(x_t, t, batch.condition)
            else:
                output = self.model(x_t, t, batch.condition, aligner.student_layers, aligner.project)
        loss = velocity_loss(output.prediction, target)
        if aligner is not None:
            with self.case.autocast():
                alignment, _ = aligner(output, batch.images)
            loss = loss + alignment
        return loss

    def step(self) -> tuple[()]:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return ()

    def held_bytes(self) -> int:
        """What it holds between two steps: weights, moments, and the teacher or what is handed in for it."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        for module in self.aligner.modules() if self.aligner is not None else ():
            tensors += module.tensors() if isinstance(module, GivenTeacher) else ()
            tensors += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return sum(x.numel() * x.element_size() for x in tensors)


def make_contenders(case: Case, variants: Iterable[Variant] = VARIANTS) -> dict[str, Contender]:
    """By name. All weights and moments are those of a first HASTE model, which has made one step."""
    batch, teacher = make_batch(case), make_teacher(case)
    said = random_output(case, teacher, batch)
    with torch.device(case.device):
        model = build_model(case.student, z_dims=(teacher.width,))
    first = Contender(HASTE, case, batch, model, make_aligner(HASTE, case, GivenTeacher(said, HASTE)))
    first.step()
    contenders = {}
    for variant in variants:
        aligner = make_aligner(variant, case, teacher if variant.teacher_runs else GivenTeacher(said, variant))
        contender = Contender(variant, case, batch, share_weights(variant, case, first.model), aligner)
        for parameter in contender.model.parameters():
            if parameter in first.optimizer.state:
                contender.optimizer.state[parameter] = first.optimizer.state[parameter]
        contenders[variant.name] = contender
    return contenders


def make_aligner(variant: Variant, case: Case, teacher: nn.Module) -> nn.Module | None:
    layer_map = case.geometry.layer_map
    if not variant.aligned or variant.released:
        return None
    if variant.eager:
        return EagerAligner(teacher, layer_map, variant.proj_coeff, variant.attn_coeff, variant.stopped)
    return Aligner([teacher], layer_map if variant.attn_coeff else None, variant.proj_coeff, variant.attn_coeff)


def share_weights(variant: Variant, case: Case, source: nn.Module) -> nn.Module:
    """A model of its own around the very parameters of another."""
    widths = [projector[-1].out_features for projector in source.projectors]
    if not variant.proj_coeff or variant.released:
        widths = []
    with torch.device("meta"):
        model = build_model(case.student, z_dims=widths)
        if variant.eager:
            materialise_maps(model)
    model.load_state_dict(source.state_dict(keep_vars=True), strict=False, assign=True)
    return model
