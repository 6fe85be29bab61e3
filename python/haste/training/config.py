"""Every setting of a training run. The names are those of HASTE's and REPA's train.py."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from haste.errors import UserError
from haste.plain import build


@dataclass
class TrainConfig:
    """The settings of `haste train`, with the values of the papers as defaults."""

    recipe: str = ""
    """A set of values for everything below, which any flag overrides. `haste train --recipe` lists them all."""

    # Where the run goes and what it learns from
    output_dir: str = "exps"
    """Folder of all runs."""
    exp_name: str = ""
    """Name of this run: its folder inside --output-dir. The same command again goes on where it stopped."""
    init_from: str = ""
    """A checkpoint (of haste, HASTE, REPA or SiT) whose weights and averaged weights a new run begins with. SiT's own,
    whose time and velocity have the other sign, are converted."""
    convention: Literal["repa", "sit"] | None = None
    """Whose the file of --init-from is, where it does not tell: repa (also HASTE's) or sit (SiT's own trainer)."""
    data_dir: str = ""
    """The training pictures: REPA's layout, as `haste prepare` writes it; a folder or zip with a folder for each class;
    or a Hugging Face data set on disk. `digits` are scikit-learn's handwritten digits, which need no download."""
    vae: str | None = None
    """mse, ema, a hub name or a folder: what turns pictures without latents into latents while training. None: pixels,
    or the latents that are there."""
    vae_stats: str | None = None
    """A file with mean and standard deviation of each latent channel, in place of the VAE's own scale."""
    on_bad_file: Literal["refuse", "skip"] = "refuse"
    """When a file is missing or damaged: refuse it, or name and count it and take another picture."""
    resolution: int = 256
    """Pixels per side of the pictures."""
    num_classes: int | None = None
    """Classes that the student knows. None: as many as the pictures have."""
    num_workers: int = 4
    """Processes that read pictures, for each training process. Pictures that fit into memory need none."""

    # The student
    model: str = "SiT-XL/2"
    """Size and patch of the student, such as SiT-B/2."""
    qk_norm: bool = False
    """Normalise queries and keys in the student's attention."""
    fused_attn: bool = True
    """Fused attention in the student; --no-fused-attn computes it step by step."""
    attention: Literal["sdpa", "flash-attn", "xformers"] = "sdpa"
    """Whose fused attention: torch's, or that of a package that must be installed."""
    compile: bool = False
    """Let torch.compile fuse the student's blocks. The first steps take a minute or so longer."""
    cfg_prob: float = 0.1
    """How often the label is dropped in training, so that samples can be guided later."""

    # What it is taught: L = velocity + proj_coeff * features + attn_coeff * attention
    enc_type: str = "dinov2-vit-b"
    """The teacher: dinov2-vit-b and the like, a hub name, or a folder written by save_pretrained(); None for plain SiT.
    Several, separated by commas, teach features together; the first one alone teaches attention."""
    attn_coeff: float = 0.5
    """Weight of the attention loss of HASTE. 0 turns it off: REPA."""
    proj_coeff: float = 0.5
    """Weight of the feature loss of REPA. 0 turns it off. With both weights 0 no teacher is loaded: plain SiT."""
    layer_map: str = ""
    """Pairs student:teacher of aligned layers, counted from 0, such as 4:8,5:9. Empty: the paper's for this model."""
    encoder_depth: int = 8
    """Number of blocks, counted from 1, after which the student's features are compared with the teacher's."""
    projector_dim: int = 2048
    """Width of the small network between the student's and the teacher's features."""
    early_stop_point: int = 250_000
    """The step from which on nothing is taught any more and the teacher is let go. -1: never."""
    termination: Literal["fixed", "cosine-ramp", "gradient-cosine", "plateau"] = "fixed"
    """How the teaching ends: all at once at --early-stop-point; by weights that fall along half a cosine until there;
    when the gradients of features and velocity point apart; when the alignment loss no longer falls. With the last two
    --early-stop-point is the latest step at which it ends."""
    ramp_start: int = 0
    """cosine-ramp: the step at which the weights begin to fall."""
    probe_start: int = 50_000
    """gradient-cosine and plateau: the step of the first probe."""
    probe_every: int = 10_000
    """gradient-cosine and plateau: steps between two probes."""
    probe_images: int = 2048
    """gradient-cosine and plateau: pictures that a probe looks at, always the same ones."""
    probe_block: int = 0
    """gradient-cosine: the block whose gradients are compared, counted from 1. 0: the one at --encoder-depth."""
    probe_threshold: float = -0.05
    """gradient-cosine: teaching ends when the mean cosine is below this."""
    plateau_patience: int = 3
    """plateau: teaching ends after so many probes without a lower alignment loss."""
    plateau_min_delta: float = 0.001
    """plateau: a loss is lower when it is below the lowest so far by more than this."""
    teacher_resolution: int | None = None
    """Pixels per side that the teacher sees. None: as many as give it the student's grid of tokens."""
    teacher_grid: Literal["match", "interpolate"] = "match"
    """Where the teacher's own grid of tokens is not the student's: resize the pictures until it is (match), or let the
    teacher see pictures of its own size, or of --teacher-resolution, and interpolate its queries, keys and features."""

    # The diffusion path
    path_type: Literal["linear", "cosine"] = "linear"
    """How data turns into noise."""
    prediction: Literal["v"] = "v"
    """What the student predicts: the velocity."""
    weighting: Literal["uniform", "lognormal"] = "uniform"
    """How often each noise level is seen."""

    # Optimisation
    batch_size: int = 256
    """Pictures per forward pass, over all devices."""
    gradient_accumulation_steps: int = 1
    """Forward passes per step: a step sees so many times --batch-size pictures."""
    max_train_steps: int = 400_000
    """Steps in all."""
    epochs: int = 1400
    """Training ends after so many times all pictures, if that is before --max-train-steps."""
    learning_rate: float = 1e-4
    """AdamW's learning rate, constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its value."""
    adam_beta1: float = 0.9
    """AdamW: memory of the gradient's mean."""
    adam_beta2: float = 0.999
    """AdamW: memory of the gradient's square."""
    adam_weight_decay: float = 0.0
    """AdamW: decay of the weights."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the root of the squares."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    ema_decay: float = 0.9999
    """How slowly the averaged weights, those that samples are drawn with, follow the trained ones."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "fp16"
    """Type of the matrix products."""
    allow_tf32: bool = False
    """Let NVIDIA GPUs round fp32 matrix products to TF32."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite: stop, and say at which step; or leave that step out and say so. Neither
    lets it reach the weights. Under fp16 an infinite gradient is left out either way."""
    seed: int = 0
    """Same seed, same run."""

    # Keeping track
    logging_steps: int = 100
    """Steps between two lines of log.jsonl."""
    checkpointing_steps: int = 50_000
    """Steps between two checkpoints. The last step, Ctrl-C and SIGTERM write one as well."""
    sampling_steps: int = 10_000
    """Steps between two previews: pictures that the averaged student draws, in previews/ of the run. 0: none."""
    keep: int = 0
    """Keep the newest so many checkpoints and delete older ones, once a newer one is whole on the disk. 0: keep all."""
    resume_step: int = 0
    """Go on from the checkpoint of this step. 0: from the newest whole one, if there is any."""
    report_to: str = "none"
    """Where the log goes besides log.jsonl: tensorboard, wandb, both with a comma between them, or none."""
    logging_dir: str = "logs"
    """Folder inside --output-dir for what tensorboard reads."""
    legacy: bool = False
    """Accepted because REPA's commands have it: checkpoints with REPA's older names are known by those names."""

    @property
    def teachers(self) -> list[str]:
        """The teachers to load; none when nothing is aligned."""
        if self.enc_type == "None" or (self.proj_coeff == 0 and self.attn_coeff == 0):
            return []
        return [name.strip() for name in self.enc_type.split(",")]

    @property
    def trackers(self) -> list[str]:
        """Those that --report-to names."""
        return [] if self.report_to in ("", "none") else [name.strip() for name in self.report_to.split(",")]

    def check(self) -> None:
        """UserError, naming the flag, its value and what it must be, for values that no run can have."""
        if not self.exp_name:
            raise UserError("--exp-name is empty; give the run a name, or a --recipe that has one")
        for name in AT_LEAST_ONE:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("num_classes", self.num_classes is None or self.num_classes >= 1, "at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            self._require(name, getattr(self, name) > 0, "greater than 0")
        for name in AT_LEAST_ZERO:
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("cfg_prob", "ema_decay", "adam_beta1", "adam_beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        self._require("early_stop_point", self.early_stop_point >= -1, "a step, or -1 for never")
        unknown = [name for name in self.trackers if name not in TRACKERS]
        self._require("report_to", not unknown, "tensorboard, wandb, both with a comma between them, or none")

    def _require(self, name: str, holds: bool, must_be: str) -> None:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {must_be}")

    def to_namespace(self) -> argparse.Namespace:
        """As the public trainers keep it in their checkpoints."""
        return argparse.Namespace(**asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the settings of a run") -> TrainConfig:
        """The known settings among `values`; the rest, such as another trainer's own flags, is left out.

        Raises UserError, naming `source` and the setting, for a value of another type.
        """
        return build(cls, values, source)


AT_LEAST_ONE = (
    "resolution", "batch_size", "gradient_accumulation_steps", "max_train_steps", "epochs", "logging_steps",
    "checkpointing_steps",
)  # fmt: skip

AT_LEAST_ZERO = (
    "proj_coeff", "attn_coeff", "warmup_steps", "adam_weight_decay", "resume_step", "num_workers", "keep",
    "sampling_steps",
)  # fmt: skip

TRACKERS = ("tensorboard", "wandb")

# What may change from one start of a run to the next: it moves the end, the bookkeeping or a folder, not the
# computation.
CHANGEABLE = {
    "recipe", "output_dir", "exp_name", "init_from", "convention", "data_dir", "num_workers", "max_train_steps",
    "epochs", "logging_steps", "checkpointing_steps", "resume_step", "report_to", "logging_dir", "legacy", "keep",
    "on_nan", "on_bad_file", "attention", "compile", "sampling_steps",
}  # fmt: skip


def differing_settings(old: Mapping[str, Any], new: TrainConfig) -> list[str]:
    """'--seed (0, now 1)' for each setting that makes `new` another run than the one that had the settings `old`.

    What `old` does not hold, because another trainer or an older version wrote it, is not compared.
    """
    after = asdict(new)
    return [
        f"--{name.replace('_', '-')} ({old[name]}, now {after[name]})"
        for name in after
        if name not in CHANGEABLE and name in old and old[name] != after[name]
    ]
