"""FD of the EMA model during training: of a fixed number of images, each time from the same noise and labels.

They are the images that `haste evaluate` samples by default: 50 Euler (of DiT: DDIM) steps without guidance, classes in
turn, noise of seed 0; of data with captions their conditions are captions that are spread over the data.

Every process samples its part and computes its features. The first one has the reference, and gathers them. The random
state of training is left as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from haste.data import TrainingData
from haste.data.images import to_uint8
from haste.distributed import in_first, progress_bar, unsharded
from haste.errors import UserError
from haste.metrics.evaluator import Evaluator, notes
from haste.metrics.features import Features, checked, concatenate, load_extractor
from haste.metrics.formulas import check_sample_size
from haste.metrics.reference import load_reference
from haste.models import Layout, get_family
from haste.samplers import Solver, initial_noise
from haste.samplers.labels import choose_labels, image_generator
from haste.training.checkpoint import capture_rng, restore_rng
from haste.training.config import TrainConfig
from haste.vae import VAE

logger = logging.getLogger(__name__)

SCORES = ("fd", "sfid", "label_accuracy")  # those of them that the network allows, under these names in log.jsonl
SEED = 0  # of noise, whatever the run's: runs of several seeds are compared on the same images


class TrainingEvaluation:
    """Scores a model by --evaluation-samples images.

    Args:
        layout: of the model.
        local_size: images that a process samples at once.

    Raises:
        UserError: features or a reference that do not work, or too few samples for an FD.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, accelerator: Accelerator, layout: Layout, local_size: int
    ) -> None:
        self.config = config
        self.data = data
        self.accelerator = accelerator
        self.layout = layout
        self.local_size = local_size
        self.count = config.evaluation_samples
        features, self._source = config.evaluation_against
        classifier = Path(config.output_dir).expanduser() / "classifier"  # of the digits, as for haste evaluate
        with accelerator.main_process_first(), own_flags():  # which trains a classifier that is missing
            self.extractor = load_extractor(features, classifier)
        if self.count <= self.extractor.dimension:
            raise UserError(f"--evaluation-samples must be above {self.extractor.dimension}, the number of features of "
                            f"{self.extractor.describe()}, for an FD, got {self.count}")  # fmt: skip
        self.evaluator: Evaluator | None = None  # of the first process
        in_first(self._load_reference)

    @classmethod
    def of_run(
        cls, config: TrainConfig, data: TrainingData, accelerator: Accelerator, layout: Layout, local_size: int
    ) -> TrainingEvaluation | None:
        """None with --evaluation-steps 0."""
        return cls(config, data, accelerator, layout, local_size) if config.evaluation_steps else None

    def _load_reference(self) -> None:
        with own_flags():
            reference = load_reference(self._source, self.extractor)
            _ = reference.gaussian  # refused now, if there are too few images
        self.evaluator = Evaluator(self.extractor, reference)
        if caution := check_sample_size(self.count, self.extractor.dimension):
            logger.warning(caution)

    def due(self, step: int, end: bool) -> bool:
        """Whether the model is evaluated after this step: every --evaluation-steps, and at the end of the run."""
        return end or step % self.config.evaluation_steps == 0

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Sample and score: SCORES by name, in the first process.

        Every process must call it. A failure, such as weights that give NaN, is logged and gives no scores.
        """
        begin, rng = perf_counter(), capture_rng()
        try:
            features, failure = self._features(model)
            scores, problems = ({}, [failure]) if failure else self._score(features)
        finally:
            restore_rng(rng)
        if problems:
            logger.warning("step %d: the evaluation lacks scores: %s", step, " ".join(problems))
        if scores:
            found = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            logger.info("step %d: %s, of %d samples in %.1f s", step, found, self.count, perf_counter() - begin)
        return scores

    def _score(self, features: Features | None) -> tuple[dict[str, float], list[str]]:
        """The scores, and why others are missing; neither in other processes than the first."""
        if self.evaluator is None or features is None:
            return {}, []
        results = self.evaluator.score(features, self._labels(range(self.count)), SCORES)
        scores = {result.key: result.value for result in results if result.value is not None}
        return scores, notes([result for result in results if result.value is None])

    # ---- samples ----

    def _features(self, model: nn.Module) -> tuple[Features | None, str | None]:
        """Features of all images, in their order, and why there are none; in the first process, else neither."""
        try:
            part: list[tuple[int, Features]] | str = self._features_of_part(model)
        except UserError as error:
            part = str(error)
        parts = gather_object([part]) if self.accelerator.num_processes > 1 else [part]
        if not self.accelerator.is_main_process:
            return None, None
        batches: list[tuple[int, Features]] = []
        for found in parts:
            if isinstance(found, str):
                return None, found
            batches += found
        return concatenate(features for _, features in sorted(batches, key=lambda batch: batch[0])), None

    @torch.no_grad()
    def _features_of_part(self, model: nn.Module) -> list[tuple[int, Features]]:
        """The features of this process's batches, each with the number of its first image."""
        family, data = get_family(model), self.data
        texts = None if self.layout.condition_shape is None else data.examples(self.count)[0]
        vae = None if data.latents is None else VAE(data.latents).to(self.accelerator.device)  # and freed
        found = []
        bar = progress_bar(total=self.count, desc="evaluate", unit="image", leave=False,
                           disable=not self.accelerator.is_main_process)  # fmt: skip
        with bar, unsharded(model) if family.in_parts else nullcontext():
            for batch in self._batches():
                # A process without images left runs the model too, as it may hold a shard of it.
                pixels = self._sample(model, list(batch) or [0], texts, vae)[: len(batch)]
                if len(batch):
                    found.append((batch.start, checked(self.extractor(pixels), self.extractor)))
                bar.update(min(len(batch) * self.accelerator.num_processes, self.count - bar.n))
        return found

    def _batches(self) -> list[range]:
        """The images of each batch of this process; as many batches as the others have, the last perhaps empty."""
        size, number, processes = self.local_size, self.accelerator.process_index, self.accelerator.num_processes
        starts = range(number * size, self.count + number * size, processes * size)
        return [range(min(start, self.count), min(start + size, self.count)) for start in starts]

    def _sample(self, model: nn.Module, numbers: list[int], texts: Tensor | None, vae: VAE | None) -> np.ndarray:
        """The images with these numbers, (n, H, W, 3) uint8."""
        family, device = get_family(model), self.accelerator.device
        generators = [image_generator(SEED, number, "noise") for number in numbers]
        noise = initial_noise((len(numbers), *self.layout.noise_shape), generators, device=device)
        condition = torch.from_numpy(self._labels(numbers)) if texts is None else texts[numbers]
        solve = Solver(path=self.config.path_type, time_shift=self.config.time_shift, null=family.null(model))
        sampled = family.sample(model, noise, family.condition(condition.to(device)), solve)
        sampled = sampled if vae is None else vae.decode(sampled)
        if not sampled.isfinite().all():
            raise UserError("the samples are not finite")
        return to_uint8(sampled)

    def _labels(self, numbers: range | list[int]) -> np.ndarray | None:
        """Classes in turn, (n,) int64; None of a model of text."""
        classes = self.layout.num_classes
        return None if classes is None else choose_labels("balanced", SEED, numbers, classes)


@contextmanager
def own_flags() -> Iterator[None]:
    """Errors that name --features and --reference of haste evaluate name those of haste train."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for name in ("features", "reference"):
            text = text.replace(f"--{name}", f"--evaluation-{name}")
        raise UserError(text) from error
