"""What is trained: a model, its EMA and its optimizer, in one process or distributed over several."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from haste._compat import lerp_all_
from haste.distributed import distribute_like, replicate, reshard, shard, sharding, synchronizing, to_local, whole
from haste.errors import UserError, in_one_line
from haste.models import ModelOutput, Weights, build_model, get_family
from haste.training.checkpoint import is_projector, parameters_in, require_names, require_shapes
from haste.training.config import TrainConfig
from haste.training.optimizer import build_optimizer, muon_matrices, parameter_groups, reorder_state

DROPOUT = 1  # beside seed and numbers, so that its random numbers are not those of the images' latents


class EMA:
    """The exponential moving average of a model's weights: ema ← decay·ema + (1 − decay)·weights."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One fused pass over all parameters, or over this process's shards."""
        reshard(self.model)  # it may have sampled, or been a teacher
        averages = [to_local(parameter) for parameter in self.model.parameters()]
        lerp_all_(averages, [to_local(parameter) for parameter in model.parameters()], 1 - self.decay)


def recompute_in_backward(blocks: Sequence[nn.Module], dropout: bool) -> None:
    """Activation checkpointing (arXiv 1604.06174): of each block inputs and outputs alone are kept, and the
    backward pass runs it again.

    Args:
        dropout: whether the blocks have random numbers, which are then the same both times.
    """
    for block in blocks:

        def forward(*inputs: Any, own: Callable[..., Any] = block.forward, **others: Any) -> Any:
            return checkpoint(own, *inputs, use_reentrant=False, preserve_rng_state=dropout, **others)

        block.forward = forward  # in place of a wrapper, which would be in the names of the weights


class TrainState:
    """Model, EMAs, optimizer and scaler. One step is forward and backward of each micro-batch in `micro_batch`, then
    `update`.

    Args:
        z_dims: widths of the teachers whose features are aligned; empty without feature alignment.
        saved: model, ema, other averages, opt and scaler to resume from. Without opt, a new run starts from these
            weights and new projectors; None initializes all weights from the global random state.
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
        resumes = saved is not None and saved.get("opt") is not None
        if not resumes:
            self.model = build_model(model_config, z_dims).to(accelerator.device)
        else:  # the weights are loaded below, so neither time nor random numbers are spent on initializing them
            with torch.device("meta"):
                self.model = build_model(model_config, z_dims)
            self.model.to_empty(device=accelerator.device)
        family = get_family(model_config)
        # The trainer drops labels for all processes together: without dropout that is all that training mode would do.
        self.random = family.dropout(model_config) > 0
        self.model.train(self.random)
        self.averages = {part: EMA(self.model, decay) for part, decay in config.ema_parts.items()}
        self.ema = self.averages["ema"]
        self.order: Sequence[str] = ()  # the names in the checkpoint, with those of freed projectors
        self.freed: dict[str, Weights] = {part: {} for part in self.models}
        if saved is not None:
            self._load_weights(saved, new_projectors=not resumes)

        self.matrices: set[str] = set()  # of Muon
        if config.optimizer == "muon":
            self.matrices = muon_matrices(self.model, family.blocks(self.model))
        if config.gradient_checkpointing:
            recompute_in_backward(family.blocks(self.model), dropout=self.random)
        if config.compile:  # block by block: all share one compilation
            for block in family.blocks(self.model):
                block.compile(fullgraph=True)
        if sharding():
            for model in self.models.values():
                shard(model, family.blocks(model), accelerator)
        # accelerate's own wrapper would copy every q and k to fp32.
        copies = accelerator.num_processes > 1 and not sharding()
        self.forward = replicate(self.model, accelerator) if copies else self.model
        parameters = dict(self.model.named_parameters())
        groups = parameter_groups(parameters, config.adam_decay, self.matrices)
        self.optimized = [name for group in groups for name in group]  # in the order of the optimizer
        self.optimizer = build_optimizer([[parameters[name] for name in group] for group in groups], config)
        if saved is not None and resumes:
            self._load_optimizer(saved)

    @property
    def models(self) -> dict[str, nn.Module]:
        """What is trained and its averages, by the part of a checkpoint that holds their weights."""
        return {"model": self.model, **{part: average.model for part, average in self.averages.items()}}

    # ---- a step ----

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Context of forward and backward of a micro-batch; gradients are exchanged in the last one of a step."""
        return synchronizing(self.forward, last)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor,
        layers: Sequence[int],
        project: bool,
        number: Sequence[int],
        tokens_after: int = 0,
    ) -> ModelOutput:
        """The forward pass.

        Args:
            number: of the step and of the local batch in it, by which dropout is seeded. So a resumed run has the same,
                and other random numbers of the run do not depend on whether there is dropout.
            tokens_after: the block whose tokens are wanted, from 1; 0: none.
        """
        hidden = {"tokens_after": tokens_after} if tokens_after else {}
        if not self.random:
            return self.forward(x_t, t, condition, layers, project, **hidden)
        devices = [x_t.device] if x_t.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            entropy = (self.config.seed, *number, DROPOUT)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
            return self.forward(x_t, t, condition, layers, project, **hidden)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss."""
        loss = loss / self.config.gradient_accumulation_steps
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, learning_rate: float) -> Tensor:
        """Update the weights, unless the gradient is not finite, and the EMA. Returns the gradient norm before
        clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # As a scaler does: where this is 1, the fused step changes nothing, and the host need not know.
            self.optimizer.found_inf = (~norm.isfinite()).float()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.update(self.model)
        return norm

    def leave_group(self) -> None:
        """Drop what refers to the process group, before it is destroyed.

        DDP's reducer must not be the last reference to the group: it would be freed under the interpreter's lock, and
        would wait for the group's threads, which may wait for that lock.
        """
        self.forward = self.model
        gc.collect()

    # ---- checkpoints ----

    @property
    def checkpoint_size(self) -> int:
        """Bytes of weights, EMAs and AdamW's two moments, or Muon's one, in fp32."""
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        moments = sum((1 if name in self.matrices else 2) * size for name, size in sizes.items())
        return 4 * (len(self.models) * sum(sizes.values()) + moments)

    def state_dict(self) -> dict[str, Any]:
        """model, ema and other averages, opt and scaler, whole and on the CPU, laid out as in the public checkpoints.

        Freed projectors are included. Every process must call it.
        """
        weights = {
            part: with_projectors(_gather(model.state_dict()), self.freed[part], self.order)
            for part, model in self.models.items()
        }
        opt, counted = self.optimizer.state_dict(), parameters_in(weights["model"], self.model)
        place = {name: number for number, name in enumerate(counted)}
        of_groups = parameter_groups(counted, self.config.adam_decay, self.matrices)
        groups = [
            {**group, "params": [place[name] for name in names]}
            for group, names in zip(opt["param_groups"], of_groups, strict=True)
        ]
        return {
            **weights,
            "opt": {
                "state": reorder_state(_gather(opt["state"]), self.optimized, list(counted)),
                "param_groups": groups,
            },
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def _load_weights(self, saved: dict[str, Any], new_projectors: bool) -> None:
        """Load model and EMAs. Projectors that the model lacks are kept for its checkpoints."""
        self.order = list(saved["model"])
        for part, model in self.models.items():
            found = saved.get(part, saved["ema"])  # of --init-from, which need not have this average
            weights = {name: value for name, value in found.items() if not is_projector(name)}
            source = model.state_dict() if new_projectors else found
            projectors = {name: value for name, value in source.items() if is_projector(name)}
            if not model.projectors:
                self.freed[part], projectors = projectors, {}
            try:
                require_names(model, weights, part)
                require_shapes(model, {**weights, **projectors}, part)
                model.load_state_dict({**weights, **projectors})
            except (UserError, RuntimeError) as error:
                raise UserError(f"the checkpoint does not fit {self.config.model}: {in_one_line(error)}") from error

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        counted = parameters_in(saved["model"], self.model)
        state = reorder_state(saved["opt"]["state"], list(counted), self.optimized)
        for number, name in enumerate(self.optimized):
            if number in state:
                like = parameters[name]
                state[number] = {key: distribute_like(value, like) for key, value in state[number].items()}
        try:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the optimizer's state does not fit {self.config.model}: {in_one_line(error)}") from error
        if self.scaler is not None and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])


def _gather(tree: Any) -> Any:
    """A copy on the CPU, with whole tensors."""
    if isinstance(tree, Tensor):
        return whole(tree).detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _gather(value) for key, value in tree.items()}
    return tree


def with_projectors(weights: Weights, projectors: Weights, order: Sequence[str]) -> Weights:
    """The weights of a model whose projectors were freed, with these in the place that they have in `order`."""
    names = list(order)
    last = max((number for number, name in enumerate(names) if name in projectors), default=len(names))
    following = next((name for name in names[last:] if name in weights), None)
    merged: Weights = {}
    for name, value in weights.items():
        if name == following:
            merged.update(projectors)
        merged[name] = value
    return {**merged, **projectors}
