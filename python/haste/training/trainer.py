"""The training loop of HASTE, REPA and plain SiT, which are one loop with different coefficients.

    L = L_v + proj_coeff·L_R + attn_coeff·L_A   while step < τ        (HASTE, arXiv 2505.16792)
    L = L_v                                     from τ on, for good

REPA is attn_coeff 0 and no τ; plain SiT is both coefficients 0, and then there is no teacher at all.
Read it from `train` down.
"""

from __future__ import annotations

import gc
import logging
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from haste.alignment import Aligner, choose_layer_map
from haste.data import Batch, BatchOrder, TrainingData, batches, load_dataset
from haste.errors import UserError, in_one_line
from haste.models import SiT
from haste.teachers.digits import DIGITS_TEACHER, ensure_digits_teacher
from haste.training.checkpoint import (
    Checkpoint,
    capture_rng,
    checkpoint_path,
    read_newest_checkpoint,
    restore_rng,
    save_checkpoint,
)
from haste.training.config import TrainConfig
from haste.training.ema import EMA
from haste.training.meter import Meter
from haste.training.run_folder import RunFolder
from haste.training.signals import StopRequest
from haste.training.students import student_shape
from haste.training.termination import make_termination
from haste.transport import interpolate, sample_time, velocity_loss

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """step: steps done in all; folder: the run's; interrupted: the signal that ended it early, if one did."""

    step: int
    folder: Path
    interrupted: signal.Signals | None = None


def train(config: TrainConfig) -> TrainResult:
    """Train, or go on with a run that was begun, until max_train_steps or until a signal asks to stop.

    Raises UserError for settings that cannot work, for a folder that holds another run, and when the loss is no longer
    finite; nothing that was saved is lost.
    """
    config.check()
    dataset = load_dataset(config.data_dir, config.resolution)
    check_fit(config)
    folder = RunFolder(config)
    checkpoint = read_newest_checkpoint(folder.checkpoints, config.resume_step)
    if checkpoint is not None:
        folder.refuse_other(TrainConfig.from_dict(vars(checkpoint["args"])), "holds a checkpoint")
    return Trainer(config, dataset, folder, make_accelerator(config), checkpoint).run()


def check_fit(config: TrainConfig) -> None:
    """UserError if the student and the layer map do not fit together."""
    depth = student_shape(config.model)["depth"]
    if config.proj_coeff and not 1 <= config.encoder_depth <= depth:
        raise UserError(
            f"--encoder-depth is {config.encoder_depth}; it must be 1 to {depth}, the depth of {config.model}"
        )
    if config.attn_coeff:
        choose_layer_map(config.layer_map, config.model).check_student(depth)


def make_accelerator(config: TrainConfig) -> Accelerator:
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
    except ValueError as error:  # a precision that the device lacks, or another than this process has used before
        raise UserError(
            f"--mixed-precision is {config.mixed_precision}, which does not work here: {in_one_line(error)}"
        ) from error
    if accelerator.num_processes > 1:
        raise UserError(f"{accelerator.num_processes} processes were launched; haste train runs in one process so far")
    return accelerator


def build_aligner(config: TrainConfig, model_config: dict) -> Aligner | None:
    """The teachers and what they teach; None if nothing is to be aligned."""
    if not config.teachers:
        return None
    names = config.teachers
    if DIGITS_TEACHER in names:
        folder = ensure_digits_teacher(Path(config.output_dir).expanduser() / "teachers")
        names = [str(folder) if name == DIGITS_TEACHER else name for name in names]
    return Aligner.from_pretrained(
        names,
        layer_map=choose_layer_map(config.layer_map, config.model) if config.attn_coeff else None,
        grid=model_config["input_size"] // model_config["patch_size"],
        proj_coeff=config.proj_coeff,
        attn_coeff=config.attn_coeff,
        image_size=config.teacher_resolution,
        grid_rule=config.teacher_grid,
    )


class Trainer:
    """One run: student, averaged student, optimizer, alignment, and the step at which they stand.

    checkpoint: where to go on from; None starts anew.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: TrainingData,
        folder: RunFolder,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.accelerator = accelerator
        self.device = accelerator.device
        self.dataset = dataset
        self.termination = make_termination(config)
        if checkpoint is not None:
            self.termination.load_state_dict(checkpoint["termination"])
        self.step = 0

        self.model_config = {
            **student_shape(config.model),
            "input_size": dataset.input_size,
            "in_channels": dataset.channels,
            "num_classes": dataset.num_classes,
            "class_dropout_prob": config.cfg_prob,
            "qk_norm": config.qk_norm,
            "fused_attn": config.fused_attn,
            "encoder_depth": config.encoder_depth,
            "projector_dim": config.projector_dim,
        }
        stopped = self.termination.stopped_at is not None
        self.aligner = None if stopped else build_aligner(config, self.model_config)
        if self.aligner is not None:
            self.aligner.to(self.device)
        z_dims = self.aligner.z_dims if self.aligner is not None else ()
        set_seed(config.seed)
        # The student is not wrapped by accelerate: its wrapper would copy every q and k to fp32 on their way out.
        self.model = SiT(**self.model_config, z_dims=z_dims).to(self.device)
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = accelerator.prepare(self._make_optimizer())
        set_seed(config.seed)  # runs that differ in their alignment alone see the same noise, times and dropped labels
        if checkpoint is not None:
            self._resume(checkpoint)

    def _make_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=self.config.learning_rate,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            weight_decay=self.config.adam_weight_decay,
            eps=self.config.adam_epsilon,
            fused=self.device.type in ("cpu", "cuda"),
        )

    # ---- the loop ----

    def run(self) -> TrainResult:
        config = self.config
        self.folder.claim()
        logger.info("%s", self._describe())
        self.model.train()
        order = BatchOrder(len(self.dataset), config.batch_size, config.seed)
        self.batches = batches(self.dataset, order, self.step, self.device)
        self.meter = Meter(config.batch_size, watch_gradient=self.accelerator.scaler is None)
        bar = tqdm(total=config.max_train_steps, initial=self.step, desc=config.exp_name, unit="step")
        with bar, logging_redirect_tqdm(), StopRequest() as stop:
            while self.step < config.max_train_steps:
                if self.aligner is not None:
                    self._probe()
                    if self.termination.due(self.step):
                        self._log(bar)
                        self._end_alignment()
                self._train_step(*self._next_batch())
                self.step += 1
                bar.update()
                last = self.step == config.max_train_steps or stop.received is not None
                save = last or self.step % config.checkpointing_steps == 0
                if save or self.step % config.logging_steps == 0:
                    self._log(bar)
                if save:
                    self._save()
                if stop.received is not None:
                    break
        return TrainResult(self.step, self.folder.path, stop.received)

    def _next_batch(self) -> Batch:
        return next(self.batches)

    def _train_step(self, student: Tensor, images: Tensor, labels: Tensor) -> None:
        """One update. Nothing here waits for a GPU."""
        config, aligner = self.config, self.aligner
        noise = torch.randn_like(student)
        t = sample_time(len(student), config.weighting, config.path_type, device=self.device)
        x_t, target = interpolate(student, noise, t, config.path_type)
        with self.accelerator.autocast():
            if aligner is None:
                output = self.model(x_t, t, labels)
            else:
                output = self.model(x_t, t, labels, aligner.student_layers, aligner.project)
        loss = velocity = velocity_loss(output.velocity, target)
        feature = attention = None
        if aligner is not None:
            with self.accelerator.autocast():
                alignment, (attention, feature) = aligner(output, images)
            loss = velocity + self.termination.weight(self.step) * alignment

        self._set_learning_rate()
        self.accelerator.backward(loss)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.meter.add(loss, velocity, feature, attention, grad_norm)

    def _set_learning_rate(self) -> None:
        """Constant, after a linear warm-up over warmup_steps."""
        warmup = min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * warmup

    # ---- the end of alignment ----

    def _probe(self) -> None:
        """Let the rule of termination measure what it decides by, at the steps at which it wants to."""
        if not self.termination.wants_probe(self.step):
            return
        count = min(self.config.probe_images, len(self.dataset))
        size = max(1, self.config.batch_size // 2)  # what half precision takes for a whole batch, fp32 takes for half
        samples = [self.dataset[index] for index in range(count)]
        raw = (self.dataset.collate(samples[start : start + size]) for start in range(0, count, size))
        batches = (self.dataset.to_batch(part, self.device) for part in raw)
        value = self.termination.measure(self.model, self.aligner, batches)
        self.termination.observe(self.step, value)
        logger.info("step %d: the probe gives %.4f", self.step, value)

    def _end_alignment(self) -> None:
        """From here on a step is a step of plain SiT: teachers, projectors and their optimizer state are gone."""
        self.termination.stopped_at = self.step
        logger.info("step %d: alignment ends (%s), the teacher is released", self.step, self.termination.reason)
        projector_parameters = set(self.model.projectors.parameters())
        self.aligner = None
        self.model.release_projectors()
        self.ema.model.release_projectors()
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in projector_parameters]
        for parameter in projector_parameters:
            self.optimizer.state.pop(parameter, None)
        del projector_parameters
        gc.collect()  # a model may hold cycles; its memory is wanted now
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- keeping track ----

    def _describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        if self.aligner is None:
            alignment = "no alignment"
        else:
            teachers = self.aligner.describe(self.model_config["num_heads"])
            alignment = f"taught {self.termination.plan} by {teachers}"
        start = f", going on from step {self.step}" if self.step else ""
        return f"{self.config.model} ({parameters:.1f} M parameters) on {self.device}, {alignment}{start}"

    def _log(self, bar: tqdm) -> None:
        record = self.meter.read(self.step)
        if record is not None:
            self.folder.log({"step": self.step, **record, "aligned": self.aligner is not None})
            bar.set_postfix(loss=f"{record['velocity_loss']:.4f}", images_per_s=f"{record['images_per_second']:.0f}")

    # ---- checkpoints ----

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        checkpoint = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "opt": self.optimizer.state_dict(),
            "args": self.config.to_namespace(),
            "steps": self.step,
            "model_config": self.model_config,
            "termination": self.termination.state_dict(),
            "rng": capture_rng(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        path = checkpoint_path(self.folder.checkpoints, self.step)
        try:
            save_checkpoint(path, checkpoint)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise UserError(f"the checkpoint {path} could not be written: {in_one_line(error)}") from error

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint stood; UserError if its weights do not fit this student."""
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.ema.model.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["opt"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit {self.config.model}: {in_one_line(error)}") from error
        if self.accelerator.scaler is not None and checkpoint["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        restore_rng(checkpoint["rng"])
        self.step = checkpoint["steps"]
        self.folder.forget_after(self.step)
