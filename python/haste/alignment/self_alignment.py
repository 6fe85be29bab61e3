"""Self-representation alignment (SRA, arXiv 2505.02831): the model's teacher is its own EMA.

What an early block makes of an image at time t is aligned, through a head, with what a later block of the EMA makes of
the same image and noise at an earlier, less noisy time t', without a head. The facts are those of the public code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haste.alignment.aligner import Aligner, AlignmentLosses
from haste.errors import UserError
from haste.models import Family, find_size, get_family
from haste.teachers.encoder import TeacherOutput

MAX_SHIFT = 0.2  # of time, between data (0) and noise (1)
BETA = 0.05
SHIFTS = 2  # beside seed and step, so that these random numbers are no others of the run


def self_alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The smooth L1 loss of tokens (B, N, C), a scalar of at least fp32: the mean of d²/(2β) where |d| < β = 0.05, else
    |d| − β/2."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return F.smooth_l1_loss(student.to(dtype), teacher.to(dtype), beta=BETA)


class SelfAligner(Aligner):
    """Alignment of a student with its EMA. There are no teachers besides, and nothing is needed of the images.

    Args:
        coefficient: weight of the loss.
        depth: the EMA's block, counted from 1. The student's is the one that its projector reads.
        width: of both blocks' tokens.
        path: between data and noise, --path-type.
        seed: of the times' shifts.
    """

    freed = "the head is"

    def __init__(self, coefficient: float, depth: int, width: int, path: str, seed: int) -> None:
        super().__init__([], None, proj_coeff=coefficient, attn_coeff=0)
        self.depth, self.path, self.seed = depth, path, seed
        self.z_dims = (width,)

    def describe(self, num_heads: int) -> str:
        return f"block {self.depth} of its EMA"

    def less_noisy(self, family: Family, t: Tensor, step: int) -> Tensor:
        """The EMA's times for a step's t (B,): t − 0.2·U, at least 0, with U uniform in [0, 1); whole where t is.

        The other random numbers of a run do not depend on these.
        """
        seed = np.random.SeedSequence((self.seed, step, SHIFTS)).generate_state(1, np.uint64)[0]
        uniform = torch.rand(len(t), generator=torch.Generator().manual_seed(int(seed))).to(t.device)
        return (t - (uniform * family.time(MAX_SHIFT)).to(t.dtype)).clamp(min=0)

    @torch.no_grad()
    def ema_outputs(
        self, ema: nn.Module, x: Tensor, noise: Tensor, t: Tensor, condition: Tensor
    ) -> list[TeacherOutput]:
        """The EMA's tokens, as the output of a teacher.

        Args:
            x, noise, condition: those of the student's step.
            t: (B,), of `less_noisy`.
        """
        x_t, _ = get_family(ema).interpolate(ema, x, noise, t, self.path)
        return [TeacherOutput([], 0, ema(x_t, t, condition, tokens_after=self.depth).tokens)]

    def losses(self, queries_keys: Any, features: Any, outputs: Any, *others: Any, **named: Any) -> AlignmentLosses:
        """The loss of the head's (B, N, C) and the EMA's tokens."""
        return AlignmentLosses(None, None, self_alignment_loss(features[0], outputs[0].patch_tokens))

    def weigh(self, losses: AlignmentLosses) -> Tensor:
        assert losses.itself is not None
        return self.proj_coeff * losses.itself


def check_self_alignment(config: Any, depth: int) -> None:
    """Raise UserError for settings that do not go with --sra-coeff; `config` is a resolved TrainConfig."""
    family, size = find_size(config.model)
    given = f"with --sra-coeff {config.sra_coeff:g}"
    if config.teachers:
        raise UserError(f"--enc-type must be None {given}, whose teacher is the run's EMA, got {config.enc_type}")
    if family.in_parts or "hidden_size" not in size:
        raise UserError(f"--sra-coeff must be 0 for {family.title}, got {config.sra_coeff:g}; it needs one time for an "
                        "image and a --hidden-size")  # fmt: skip
    if config.projection_layer_type != "mlp":
        raise UserError(f"--projection-layer-type must be left out {given}, got {config.projection_layer_type}")
    if not config.encoder_depth <= config.block_out_t <= depth:
        raise UserError(f"--block-out-t must be {config.encoder_depth}, the --encoder-depth, to {depth}, the depth of "
                        f"the model, got {config.block_out_t}")  # fmt: skip
