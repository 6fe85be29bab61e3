"""The training loop of HASTE, REPA and the vanilla model: one loop with different coefficients.

    L = L_v + proj_coeff·L_R + attn_coeff·L_A   while step < τ        (HASTE, arXiv 2505.16792)
    L = L_v                                     from τ on

L_v is the family's own loss: of the velocity, or of noise and variance for DiT. REG (arXiv 2507.01467) adds
cls_coeff·L_cls to both, of the teacher's class token, for which it keeps the teacher to the end.

REPA is attn_coeff 0 and no τ. With both coefficients 0 no teacher is loaded.
"""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from haste.alignment import Aligner
from haste.alignment.dispersive import dispersive_loss
from haste.alignment.self_alignment import SelfAligner
from haste.alignment.termination import make_termination
from haste.data import Batch, Loader, TrainingData, load_dataset
from haste.data.dataset import describe_change, other_latents
from haste.distributed import StopRequest, in_first, progress_bar
from haste.errors import UserError, in_one_line
from haste.io import require_space, save_tensors
from haste.models import get_family, join, new_config
from haste.registry import ENCODERS
from haste.training.accelerator import make_accelerator
from haste.training.checkpoint import (
    Checkpoint,
    capture_rng,
    checkpoint_path,
    initial_checkpoint,
    read_checkpoint,
    read_newest_checkpoint,
    restore_rng,
)
from haste.training.class_token import check_start, with_class_token
from haste.training.config import TrainConfig, describe_run, resolve
from haste.training.evaluation import TrainingEvaluation
from haste.training.logging import Metrics, Trackers
from haste.training.run_dir import SAMPLES, Retention, RunDir
from haste.training.samples import TrainingSamples
from haste.training.schedule import LearningRate
from haste.training.state import TrainState
from haste.training.teachers import build_aligner, check_channels
from haste.transport import shift_time
from haste.validation import shown

logger = logging.getLogger(__name__)

CAPTIONS = 64  # of the data, that a checkpoint holds for samples of captions


@dataclass
class TrainResult:
    """What `train` returns.

    Attributes:
        step: steps done in all.
        folder: of the run.
        interrupted: the signal that ended the run early, or None.
    """

    step: int
    folder: Path
    interrupted: signal.Signals | None = None


def train(config: TrainConfig) -> TrainResult:
    """Train, or resume the run in the folder, until max_train_steps, SIGINT or SIGTERM.

    Args:
        config: the settings, those of `haste train`.

    Raises:
        UserError: settings that cannot work, a folder with another run, a loss that is not finite. Saved files are
            kept.
    """
    if not isinstance(config, TrainConfig):
        raise UserError(f"config must be a TrainConfig, such as TrainConfig.from_preset('digits'), got {shown(config)}")
    config.check()
    config.check_model()
    dataset = load_dataset(
        config.data_dir,
        config.resolution,
        vae=config.vae,
        vae_stats=config.vae_stats,
        latents_dir=config.latents_dir,
        image_dir=config.image_dir,
        on_bad_file=config.on_bad_file,
        num_classes=config.num_classes,
        random_flip=config.random_flip,
        cache=Path(config.output_dir).expanduser() / ENCODERS,
    )
    config = resolve(config, dataset.num_classes)
    accelerator = make_accelerator(config)
    folder = RunDir(config)
    with ExitStack() as stack:
        in_first(lambda: stack.enter_context(folder.hold()))
        in_first(folder.settle)
        checkpoint = read_newest_checkpoint(folder.checkpoints, folder.branches.step_to_read(config.resume_step))
        if checkpoint is not None:
            folder.check_same_config(checkpoint["args"])
            check_same_data(config, dataset, checkpoint)
        return Trainer(config, dataset, folder, accelerator, checkpoint).run()


def check_same_data(config: TrainConfig, dataset: TrainingData, checkpoint: Checkpoint) -> None:
    """Raise UserError if the run began with other data, as far as the checkpoint shows."""
    changed = describe_change(checkpoint.get("data") or {}, dataset.fingerprint())
    began = checkpoint.get("latents")
    if began and dataset.latents is not None and other_latents(began, asdict(dataset.latents)):
        changed.append("another scale or shift of the latents")
    text = checkpoint.get("text")
    if text and dataset.text is not None and text["width"] != dataset.text.width:
        changed.append(f"text features of width {dataset.text.width}, which was {text['width']}")
    if changed:
        raise UserError(
            f"--data-dir must be the data that this run began with, got {config.data_dir}, which differs: "
            f"{', '.join(changed)}; for other data start another --exp-name, with --init-from for the weights"
        )


class RandomNumbers(NamedTuple):
    """Noise (B, C, S, S), times (B, ...), whether the label is dropped, (B,) bool, and the EMA's times, of a step."""

    noise: Tensor
    t: Tensor
    dropped: Tensor
    less_noisy: Tensor

    def local(self, number: int, size: int) -> RandomNumbers:
        """Those of the local batch with this number and size."""
        return RandomNumbers(*(values[number * size : (number + 1) * size] for values in self))


class Trainer:
    """One run: the model, its alignment and the current step.

    Every process makes the noise, times and dropped labels of the whole step and uses those of its local batches. So a
    run does not depend on the number of processes, except for the order of sums.

    Args:
        checkpoint: to resume from; None starts a new run.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: TrainingData,
        folder: RunDir,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.accelerator = accelerator
        self.device = accelerator.device
        self.trackers = Trackers(accelerator)
        self.data = dataset
        self.fingerprint = dataset.fingerprint()
        self.captions = dataset.captions(CAPTIONS)
        self.local_size = config.batch_size // accelerator.num_processes  # images per process and micro-batch
        self.step_size = config.batch_size * config.gradient_accumulation_steps
        self.retention = Retention(folder.checkpoints, config.checkpoints_total_limit)
        of_epochs = self._steps_of_epochs(config.epochs)
        self.last_step = min(config.max_train_steps, of_epochs)
        self.learning_rate = LearningRate.of_run(config, self.last_step)
        self.end = f"--epochs {config.epochs} of {len(dataset):,} images in steps of {self.step_size:,}"
        if config.max_train_steps <= of_epochs:
            self.end = f"--max-train-steps {config.max_train_steps}"
        self.step = 0 if checkpoint is None else checkpoint["steps"]
        if checkpoint is not None:
            self._warn_of_another_length(checkpoint["args"])
        self.termination = make_termination(config)
        if checkpoint is not None and checkpoint["termination"] is not None:
            self.termination.load_state_dict(checkpoint["termination"])
        elif self.termination.due(self.step):
            self.termination.stopped_at = self.step

        self.model_config = new_config(config, dataset)
        self.family = get_family(self.model_config)
        self.layout = self.family.layout(self.model_config)
        initial = checkpoint
        if checkpoint is not None:
            self._check_family(checkpoint, "--exp-name must be a run", folder.path)
        elif config.init_from:
            initial = self._read_initial()
        ended = self.termination.stopped_at is not None
        if config.teachers and (not ended or config.has_class_token):
            dataset.require_images()
        with accelerator.main_process_first():  # which downloads or trains the teachers that are missing
            self.aligner = build_aligner(config, self.model_config, ended)
        if self.aligner is not None:
            check_channels(config, dataset, self.aligner)
            self.aligner.to(self.device)
            self.model_config = with_class_token(self.model_config, self.aligner, initial)
            self.layout = self.family.layout(self.model_config)
        self.evaluation = TrainingEvaluation.of_run(config, dataset, accelerator, self.layout, self.local_size)
        set_seed(config.seed)
        self.state = self._build_state(initial)
        if checkpoint is not None and checkpoint["rng"] is not None:
            restore_rng(checkpoint["rng"])
        else:  # so that runs with different alignment have the same noise, times and dropped labels
            set_seed((config.seed + self.step) % 2**32)

    def _read_initial(self) -> dict[str, Any]:
        """The checkpoint of --init-from. Raises UserError if it is of another family, or of another kind of model."""
        path = initial_checkpoint(Path(self.config.init_from).expanduser())
        found = read_checkpoint(path, convention=self.config.convention)
        self._check_family(found, "--init-from must be a checkpoint", path)
        self.family.check_start(self.model_config, found["model_config"])
        check_start(self.config, found["model_config"])
        began = found.get("text")
        if began and self.data.text is not None and began["encoder"] != self.data.text.encoder:
            logger.warning("--init-from was trained on features of %s, and the data has those of %s",
                           began["encoder"], self.data.text.encoder)  # fmt: skip
        return {**found, "opt": None}

    def _check_family(self, checkpoint: dict[str, Any], what: str, source: Path) -> None:
        """Raise UserError for weights of another family, whose shapes may be the same."""
        found = get_family(checkpoint["model_config"])
        if found.name != self.family.name:
            wanted = f"{self.family.title}, as --model {self.config.model}"
            raise UserError(f"{what} of {wanted}, got one of {found.title}: {source}")

    def _steps_of_epochs(self, epochs: int) -> int:
        return max(1, epochs * len(self.data) // self.step_size)

    def _warn_of_another_length(self, recorded: dict[str, Any]) -> None:
        """Log if the run had another length until now, and so another learning rate."""
        before = min(
            recorded.get("max_train_steps", self.config.max_train_steps),
            self._steps_of_epochs(recorded.get("epochs", self.config.epochs)),
        )
        try:
            former = LearningRate.of_run(self.config, before)
        except UserError:  # a run that was begun when the two need not fit
            return
        if self.learning_rate.differs(former):
            logger.warning(
                "the learning rate follows the run's length, %d steps; until now that was %d", self.last_step, before
            )

    def _build_state(self, saved: dict[str, Any] | None) -> TrainState:
        z_dims: Sequence[int] = self.aligner.z_dims if self.aligner is not None else ()
        state = TrainState(self.model_config, z_dims, self.config, self.accelerator, saved)
        for model in state.models.values():
            self.family.set_null(model, self._null)
        return state

    @property
    def _null(self) -> Tensor | None:
        """What stands for no caption, if captions are dropped. Raises UserError if it is not known."""
        if not self.config.label_dropout or self.layout.condition_shape is None:
            return None
        if self.data.null is None:
            raise UserError(f"--cfg-prob must be 0 for data without the features of an empty caption, got "
                            f"{self.config.cfg_prob:g} for --data-dir {self.config.data_dir}")  # fmt: skip
        return self.data.null

    @property
    def _needs_images(self) -> bool:
        return self.aligner is not None and len(self.aligner.teachers) > 0

    # ---- the loop ----

    def run(self) -> TrainResult:
        try:
            interrupted = self._run()
        finally:
            self.state.leave_group()
            self.trackers.close()
        return TrainResult(self.step, self.folder.path, interrupted)

    def _run(self) -> signal.Signals | None:
        """Run the loop. Returns the signal that ended it early, or None."""
        config = self.config
        in_first(self._create_folder)
        self.trackers.start(config)
        if config.preset:
            logger.info("preset %s: %s", config.preset, describe_run(config))
        logger.info("%s", self._describe())
        logger.info("training ends after step %d: %s; %s", self.last_step, self.end, self.learning_rate)
        self.loader = Loader(self.data, config, self.accelerator, self.step, images=self._needs_images)
        shape = self.layout.noise_shape
        samples = TrainingSamples(self.folder.path / SAMPLES, config, self.data, self.accelerator, shape)
        self.metrics = Metrics(self.accelerator, config, self.model_config)
        hidden = not self.accelerator.is_local_main_process
        bar = progress_bar(total=self.last_step, initial=self.step, desc=config.exp_name, unit="step", disable=hidden)
        interrupted, saved = None, True
        with bar, logging_redirect_tqdm(), StopRequest() as stop:
            while self.step < self.last_step and interrupted is None:
                if self.aligner is not None:
                    self._probe(self.aligner)
                    if self.termination.due(self.step):
                        self._log(bar)
                        self._end_alignment(self.aligner)
                self._train_step()
                self.step += 1
                bar.update()
                interrupted = stop.poll()
                end = self.step == self.last_step
                last = end or interrupted is not None
                log = last or self.step % config.logging_steps == 0
                save = last or self.step % config.checkpointing_steps == 0 or (log and not saved)  # a retry
                sample = bool(config.sampling_steps) and (end or self.step % config.sampling_steps == 0)
                evaluate = self.evaluation is not None and self.evaluation.due(self.step, end)
                if save or log or sample or evaluate:
                    self._log(bar, evaluate)
                if sample:  # before the checkpoint, as evaluations: a kill between would leave the step without them
                    grid = samples.sample(self.state.ema.model, self.step)
                    if grid is not None:
                        self.trackers.log_image(grid, self.step)
                if save:
                    saved = self._save(must=last)
                if save or sample or evaluate:
                    self.metrics.start_clock()  # none is part of a step
        self.folder.close()
        samples.close()
        return interrupted

    def _create_folder(self) -> None:
        self.folder.create(self.state.checkpoint_size)
        self.folder.truncate_log(self.step)

    def _train_step(self) -> None:
        """One optimizer step. Nothing here waits for a GPU."""
        count, processes = self.config.gradient_accumulation_steps, self.accelerator.num_processes
        numbers = self._random_numbers()
        for number in range(count):
            batch = self.loader.next(self.step, number)
            local = number * processes + self.accelerator.process_index
            with self.state.micro_batch(last=number == count - 1):
                self._forward_backward(batch, numbers.local(local, self.local_size), local)
        self.metrics.add_norm(self.state.update(self.learning_rate(self.step)))

    def _random_numbers(self) -> RandomNumbers:
        config, count = self.config, self.step_size
        shape, token = self.layout.sequence_shape or self.layout.input_shape, self.layout.class_token
        noise = torch.randn(count, *shape, device=self.device)
        t = self.family.sample_times(self.state.model, count, config.weighting, config.path_type, device=self.device)
        t = shift_time(t, config.time_shift, config.path_type)
        dropped = torch.zeros(count, dtype=torch.bool, device=self.device)
        if config.label_dropout:
            dropped = torch.rand(count, device=self.device) < config.label_dropout
        if token:  # last, so that the other numbers are those of a run without it
            noise = join(noise, torch.randn(count, token, device=self.device))
        aligner = self.aligner
        less_noisy = aligner.less_noisy(self.family, t, self.step) if isinstance(aligner, SelfAligner) else t
        return RandomNumbers(noise, t, dropped, less_noisy)

    def _forward_backward(self, batch: Batch, numbers: RandomNumbers, local: int) -> None:
        """Losses and gradients of the local batch with this number."""
        aligner, family, model = self.aligner, self.family, self.state.model
        condition = family.drop(model, family.condition(batch.condition), numbers.dropped)
        inputs, outputs = batch.inputs, None
        if aligner is not None and aligner.class_token:  # which is part of the input
            with self.accelerator.autocast():
                outputs = aligner.teacher_outputs(batch.images)
            inputs = aligner.with_class_token(inputs, outputs)
        elif isinstance(aligner, SelfAligner):
            with self.accelerator.autocast():
                ema, t = self.state.ema.model, numbers.less_noisy
                outputs = aligner.ema_outputs(ema, inputs, numbers.noise, t, condition)
        x_t, target = family.interpolate(model, inputs, numbers.noise, numbers.t, self.config.path_type)
        layers, project = ((), False) if aligner is None else (aligner.student_layers, aligner.project)
        with self.accelerator.autocast():
            output = self.state(x_t, numbers.t, condition, layers, project, (self.step, local), self.config.disp_block)
        loss = own = family.loss(output.prediction, target)
        feature = attention = itself = dispersive = None
        class_token = family.class_token_loss(output.prediction, target)
        if class_token is not None:
            loss = loss + self.config.cls_coeff * class_token
        if aligner is not None and aligner.aligns:
            with self.accelerator.autocast():
                alignment, (attention, feature, itself) = aligner(output, batch.images, outputs)
            loss = loss + self.termination.weight(self.step) * alignment
        if output.tokens is not None:
            dispersive = dispersive_loss(output.tokens, self.config.disp_tau)
            loss = loss + self.config.disp_coeff * dispersive
        self.state.backward(loss)
        self.metrics.add(own, feature, attention, loss, dispersive, class_token, itself)

    # ---- the end of alignment ----

    def _probe(self, aligner: Aligner) -> None:
        """Measure what the termination rule needs, at the steps of its probes."""
        if self.termination.wants_probe(self.step):
            value = self.termination.measure(self.state.model, aligner, self.loader.probe(), self.accelerator.reduce)
            self.termination.observe(self.step, value)
            logger.info("step %d: the probe gives %.4f", self.step, value)

    def _end_alignment(self, aligner: Aligner) -> None:
        """Free teachers, projectors and their optimizer state, so that steps cost what those of the vanilla model do.

        The state is rebuilt from what a checkpoint would hold, as if training had been resumed here.
        """
        self.termination.stopped_at = self.step
        left = "the teacher gives class tokens alone" if self.config.has_class_token else f"{aligner.freed} freed"
        logger.info("step %d: alignment ends (%s), %s", self.step, self.termination.reason, left)
        saved = self.state.state_dict()
        self.aligner = aligner.without_losses()
        del self.state
        gc.collect()  # the memory is needed now, also that of reference cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.state = self._build_state(saved)
        self.loader.close()
        self.loader = Loader(self.data, self.config, self.accelerator, self.step, images=self._needs_images)
        self.metrics.start_clock()

    # ---- logging ----

    def _describe(self) -> str:
        parameters = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        alignment = "no alignment"
        if self.aligner is not None:
            teachers = self.aligner.describe(self.layout.num_heads)
            plan = f"aligned {self.termination.plan}" if self.aligner.aligns else alignment
            alignment = f"{plan} with {teachers}"
        processes = self.accelerator.num_processes
        where = f"{processes} processes on {self.device.type}" if processes > 1 else self.device
        start = f", resumed from step {self.step}" if self.step else ""
        return f"{self.config.model} ({parameters:.1f} M parameters) on {where}, {alignment}{start}"

    def _log(self, bar: tqdm, evaluate: bool = False) -> None:
        metrics = self.metrics.read(self.step)
        if metrics is None:
            return
        rate = self.learning_rate(self.step - 1)  # of the last step
        aligned = self.aligner is not None and self.aligner.aligns
        record = {"step": self.step, **metrics, "learning_rate": rate, "aligned": aligned}
        if evaluate and self.evaluation is not None:
            record |= self.evaluation.measure(self.state.ema.model, self.step)
        if self.accelerator.is_main_process:
            self.folder.log(record)
        self.trackers.log(record, self.step)
        loss = record["loss"]  # None if every step since the last line was skipped
        speed = f"{record['images_per_second']:.0f}"
        bar.set_postfix(loss="-" if loss is None else f"{loss:.4f}", images_per_s=speed, refresh=False)

    # ---- checkpoints ----

    def _save(self, must: bool) -> bool:
        """Write a checkpoint. Returns whether that worked; with `must`, raises UserError if it did not."""
        checkpoint = {
            **self.state.state_dict(),
            "args": self.config.to_namespace(),
            "steps": self.step,
            "model_config": self.model_config,
            "termination": self.termination.state_dict(),
            "rng": capture_rng(),
            "data": self.fingerprint,
            "latents": None if self.data.latents is None else asdict(self.data.latents),
            "class_names": None if self.data.class_names is None else list(self.data.class_names),
            "text": None if self.data.text is None else asdict(self.data.text),
            "null": self._null,
            "captions": self.captions,
        }
        path, failure = checkpoint_path(self.folder.checkpoints, self.step), ""
        if self.accelerator.is_main_process:
            try:
                require_space(path.parent, self.state.checkpoint_size)
                save_tensors(path, checkpoint)
                self.retention.written(path)
            except OSError as error:
                failure = in_one_line(error)
        # Only the first process writes, and all must continue in the same way.
        failed = self.accelerator.reduce(torch.tensor(float(bool(failure)), device=self.device), reduction="sum") > 0
        if failed and must:
            raise UserError(f"the checkpoint {path} could not be written: {failure}")
        if failed:
            logger.error("the checkpoint %s could not be written, and training goes on: %s", path, failure)
        return not failed
