"""The exponential moving average of the weights, which is what samples are drawn with.

What is trained: a model, its average, its optimizer; in one process, or spread over several.

What a run feeds on: its batches from any step on, and the images that a rule of termination looks at.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from haste.data import Batch, BatchOrder, TrainingData, batches
from haste.errors import UserError, in_one_line
from haste.models import ModelOutput, build_model, get_family
from haste.training.config import TrainConfig
from haste.training.conventions import Weights, reorder_state, require_names, require_shapes, with_projectors
from haste.training.launch import own, replicate, shard, sharding, share_like, synchronising, whole


class EMA:
    """A second copy of a model that follows the first: ema ← decay·ema + (1 − decay)·weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One fused pass over all parameters, or over this process's shares of them."""
        averages = [own(parameter) for parameter in self.model.parameters()]
        torch._foreach_lerp_(averages, [own(parameter) for parameter in model.parameters()], 1 - self.decay)


class TrainState:
    """One step: forward and backward passes inside `passes`, then `update`.

    model_config: of the model, as its family has it.
    z_dims: widths of the teachers that teach features; empty when none does (any more).
    saved: model, ema, opt and scaler to go on from. Without opt a new run begins with these weights and with new
        projectors; None draws all weights from the global random state.
    """

    def __init__(
        self,
        model_config: dict[str, Any],
        z_dims: Sequence[int],
        config: TrainConfig,
        accelerator: Accelerator,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.scaler = accelerator.scaler
        goes_on = saved is not None and saved.get("opt") is not None
        if not goes_on:
            self.model = build_model(model_config, z_dims).to(accelerator.device)
        else:  # no time is spent on weights that are replaced at once, and no random number drawn
            with torch.device("meta"):
                self.model = build_model(model_config, z_dims)
            self.model.to_empty(device=accelerator.device)
        # The trainer drops labels for all processes together, which is all that training mode would do.
        self.model.eval()
        self.ema = EMA(self.model, config.ema_decay)
        self.released: dict[str, Weights] = {"model": {}, "ema": {}}
        if saved is not None:
            self._load_weights(saved, new_projectors=not goes_on)

        if config.compile:  # a block at a time: all share one compilation
            for block in get_family(self.model).blocks(self.model):
                block.compile(fullgraph=True)
        if sharding():
            shard(self.model, accelerator)
            shard(self.ema.model, accelerator)
        # accelerate's own wrapper would copy every q and k to fp32 on their way out.
        copies = accelerator.num_processes > 1 and not sharding()
        self.forward = replicate(self.model, accelerator) if copies else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        if goes_on:
            self._load_optimizer(saved)

    # ---- a step ----

    def passes(self, last: bool) -> AbstractContextManager:
        """Around one forward and backward pass; `last` of this step's, whose gradients are exchanged."""
        return synchronising(self.forward, last)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor, layers: Sequence[int], project: bool) -> ModelOutput:
        return self.forward(x_t, t, condition, layers, project)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one pass's loss, as a share of the step's."""
        loss = loss / self.config.gradient_accumulation_steps
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, learning_rate: float) -> Tensor:
        """One step of AdamW and of the average, or none if the gradient is not finite.

        Returns the length of the gradient, before it was scaled down.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # As a scaler does it: where this is 1, the fused step changes nothing, and the host need not know.
            self.optimizer.found_inf = (~norm.isfinite()).float()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        return norm

    def leave_group(self) -> None:
        """Lets go of the other processes, before their group is dissolved.

        The reducer of DDP must not be the last one that holds the group. It would be freed under the interpreter's
        lock, and would wait for the group's threads, which may be waiting for that lock.
        """
        self.forward = self.model
        gc.collect()

    # ---- checkpoints ----

    @property
    def checkpoint_size(self) -> int:
        """Bytes of weights, average and AdamW's two moments, in fp32."""
        return 4 * 4 * sum(parameter.numel() for parameter in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """model, ema, opt and scaler, whole and on the CPU, laid out as in the public checkpoints.

        The projectors stay under their names when they have been let go of. Every process must ask.
        """
        own_names = [name for name, _ in self.model.named_parameters()]
        weights = {
            part: with_projectors(_gather(model.state_dict()), self.released[part])
            for part, model in (("model", self.model), ("ema", self.ema.model))
        }
        opt = self.optimizer.state_dict()
        state = reorder_state(_gather(opt["state"]), own_names, list(weights["model"]))
        group = {**opt["param_groups"][0], "params": list(range(len(weights["model"])))}
        return {
            **weights,
            "opt": {"state": state, "param_groups": [group]},
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def _load_weights(self, saved: dict[str, Any], new_projectors: bool) -> None:
        """UserError if they are not those of such a student. Projectors that it lacks are kept for its checkpoints."""
        for part, model in (("model", self.model), ("ema", self.ema.model)):
            weights = {name: value for name, value in saved[part].items() if not _is_projector(name)}
            projectors = {name: value for name, value in saved[part].items() if _is_projector(name)}
            if new_projectors:
                projectors = {name: value for name, value in model.state_dict().items() if _is_projector(name)}
            if not model.projectors:
                self.released[part], projectors = projectors, {}
            try:
                require_names(model, weights, part)
                require_shapes(model, {**weights, **projectors}, part)
                model.load_state_dict({**weights, **projectors})
            except (UserError, RuntimeError) as error:
                raise UserError(f"the checkpoint does not fit {self.config.model}: {in_one_line(error)}") from error

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        state = reorder_state(saved["opt"]["state"], list(saved["model"]), list(parameters))
        for number, parameter in enumerate(parameters.values()):
            if number in state:
                state[number] = {key: share_like(value, parameter) for key, value in state[number].items()}
        try:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the optimizer's state does not fit {self.config.model}: {in_one_line(error)}") from error
        if self.scaler is not None and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])


def _is_projector(name: str) -> bool:
    return name.startswith("projectors.")


def _gather(tree: Any) -> Any:
    """A copy on the CPU in which every tensor is whole."""
    if isinstance(tree, Tensor):
        return whole(tree).detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _gather(value) for key, value in tree.items()}
    return tree


class Feed:
    """This process's share of every pass's images.

    What is random in a batch, such as a latent drawn from its mean and standard deviation, is a function of the seed,
    the pass and the process: it needs no place in a checkpoint.

    start: the step to begin with. images: whether a teacher looks at the images.
    """

    def __init__(
        self, data: TrainingData, config: TrainConfig, accelerator: Accelerator, start: int, images: bool
    ) -> None:
        self.data = data if images else data.without_images()
        self.config = config
        self.accelerator = accelerator
        self.chance = torch.Generator(accelerator.device)
        order = BatchOrder(len(data), config.batch_size, config.seed)
        self._batches = self._share(order, start * config.gradient_accumulation_steps)

    def _share(self, order: BatchOrder, start: int) -> Iterator[Batch]:
        return batches(
            self.data,
            order,
            start,
            self.accelerator.device,
            self.config.num_workers,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.chance,
        )

    def next(self, step: int, number: int) -> Batch:
        """The images of a step's pass with this number; to be asked for in order."""
        self._seed(step * self.config.gradient_accumulation_steps + number)
        return next(self._batches)

    def probe(self) -> Iterator[Batch]:
        """The images of a probe, the same ones every time. Half as many at once: a probe computes in fp32."""
        processes = self.accelerator.num_processes
        size = max(1, self.config.batch_size // processes // 2) * processes
        self._seed(0)
        count = max(1, min(self.config.probe_images, len(self.data)) // size)
        return itertools.islice(self._share(BatchOrder(len(self.data), size, seed=0), 0), count)

    def close(self) -> None:
        """End the processes that read ahead."""
        self._batches.close()

    def _seed(self, number: int) -> None:
        entropy = (self.config.seed, number, self.accelerator.process_index)
        self.chance.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
