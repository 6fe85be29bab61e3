"""What a model family is.

A family is one file: a module with the public parameter names, and a `Family` object that is registered by name.
Trainer, samplers, checkpoints, caches and reports use that object only. A family of your own needs no change of haste:
`haste.models.register(MyFamily())`, or an entry point `haste.families` of an installed package, and `--model` takes its
sizes.

Shapes: x is an image or latent (B, C, H, W); t is (B,), or of the shape that `sample_times` gives it, batch first; the
condition is any tensor with the batch first, such as classes (B,) int64 or text features (B, tokens, width).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from haste import transport
from haste.samplers import PartCache, Solver

# Arguments of a size that settings may have of their own. The last three have defaults, in `Family.settings`.
SIZES = ("depth", "hidden_size", "num_heads", "patch_size", "positions", "norm", "mlp")
OWN_SETTINGS = ("entity", "entity_size", "context", "dropout", "cls_coeff")  # settings that not every family has


class ModelOutput(NamedTuple):
    """What a model returns.

    prediction: the velocity, shaped as x; or what else the family's `loss` compares with its target, such as noise.
    queries_keys: for each layer that was asked for, in that order, (q, k) as attention used them, each (B, H, N, D),
        strided. The image's tokens are the last ones, row by row, or as `order` says.
    projections: per projector (B, tokens of the image, z_dim); empty unless asked for.
    prefix: rows of q and k in front of the image's, as of a text.
    causal: tokens of a block, where attention was block-causal over the image's; 0: each saw all.
    tokens: (B, tokens of the image, width) after one block, in the same order; None unless asked for.
    order: (tokens of the image,) int64, on the device of x: which token of the image, row by row, each row of q, k and
        projections is, after the prefix; None for row by row.
    """

    prediction: Tensor
    queries_keys: list[tuple[Tensor, Tensor]]
    projections: list[Tensor]
    prefix: int = 0
    causal: int = 0
    order: Tensor | None = None
    tokens: Tensor | None = None


class Layout(NamedTuple):
    """The sizes that training, alignment and sampling go by.

    input_shape: (C, H, W) of one x. grid: tokens along a side of the image. depth: layers with attention, from 0.
    num_heads: of each. num_classes: without the null class; None where the condition is not a class.
    parts: of an image that are sampled one after the other. sequence_shape: of the noise of one image, where it is not
    that of x. condition_shape: of the condition of one image, such as the (tokens, width) of its text's features; None
    for a class. class_token: numbers of a teacher's class token that is denoised along with the image, behind it.
    """

    input_shape: tuple[int, int, int]
    grid: int
    depth: int
    num_heads: int
    num_classes: int | None
    parts: int = 1
    sequence_shape: tuple[int, ...] | None = None
    condition_shape: tuple[int, ...] | None = None
    class_token: int = 0

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise of one image."""
        if self.class_token:
            return (prod(self.input_shape) + self.class_token,)
        return self.sequence_shape or self.input_shape


@dataclass(frozen=True)
class PublishedAlignment:
    """HASTE's layers for one size. layer_map: "student:teacher" pairs from 0, "" if none is published. encoder_depth:
    the block, counted from 1, whose features are aligned."""

    layer_map: str
    encoder_depth: int


Streams: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""What blocks pass on: the image's tokens (B, N, D); of two streams the other's, such as a text's, (B, L, D), and the
image's."""


class CachedBlock(Protocol):
    """One block: to the image's tokens it adds gate ⊙ attention, then gate ⊙ MLP, steered by c (B, D). Another stream
    may run beside them."""

    adaLN_modulation: nn.Sequential
    """What makes the image's modulation: an activation, then one linear layer of 6·D outputs."""

    def run(self, streams: Streams, c: Tensor, image_alone: bool = False) -> Streams:
        """The next streams. image_alone: nothing reads the other one, which may come back as it came."""

    def record(self, streams: Streams, c: Tensor, attention: Tensor, mlp: Tensor) -> Streams:
        """As `run`. Writes the image's attention and MLP outputs before their gates to `attention` and `mlp`, (B, N, D)
        each."""


class CachedTransformer(Protocol):
    """A model as a cache takes it apart: output(tokens, c) of the image's tokens after all blocks have run on
    streams(x, condition), with c = conditioning(t, condition)."""

    @property
    def blocks(self) -> Sequence[CachedBlock]: ...

    @property
    def tokens_shape(self) -> tuple[int, int]:
        """(N, D) of one image."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""

    def prefix(self, condition: Tensor | None = None) -> int:
        """Tokens of the other stream under this condition, by default one as the model was trained with; 0 if there is
        no such stream."""

    def tokens(self, x: Tensor) -> Tensor:
        """x as the image's tokens (B, N, D)."""

    def streams(self, x: Tensor, condition: Tensor) -> Streams:
        """What the first block takes."""

    def conditioning(self, t: Tensor, condition: Tensor) -> Tensor:
        """c (B, D); of t (S, 1), at S times of which each holds for the whole batch, (S, B, D)."""

    def output(self, tokens: Tensor, c: Tensor) -> Any:
        """What the model returns, made of the image's last tokens."""


class SamplingCost(NamedTuple):
    """flops: of the matrix products for one image. kept_bytes: what a batch keeps from one evaluation to the next, such
    as keys and values."""

    flops: int
    kept_bytes: int


Weights = dict[str, Tensor]

Convention = Literal["repa", "sit", "dit"]
"""What a model's times and predictions are. repa (also HASTE's, and haste's): t = 0 is data, the velocity is ε − x.
sit: t = 1 is data, the velocity is x − ε. dit: t is a whole number to 999, and noise and variance are predicted."""


@dataclass(frozen=True)
class CheckpointFile:
    """By what it is told who wrote a checkpoint.

    weights: of its model, by name. args: the settings of the run that wrote it; may be empty. content: all that it
    holds. path: the file. convention: --convention, for a file that does not show it.
    """

    weights: Mapping[str, Tensor]
    args: Mapping[str, Any] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path("checkpoint.pt")
    convention: Convention | None = None


class ForeignCheckpoints:
    """How checkpoints that other trainers wrote of a family's models become haste's. The default changes nothing."""

    def rename(self, weights: Mapping[str, Tensor]) -> Weights:
        """Weights under the names that the family's modules have."""
        return dict(weights)

    def find_convention(self, file: CheckpointFile) -> Convention | None:
        """The convention of a checkpoint; None for one of another family, be it of weights of the same names.

        Raises:
            UserError: the file shows no convention and none is given, or it shows another one than is given; it is of
                a run that trained a model which cannot be used.
        """
        return "repa"

    def convert_weights(self, weights: Mapping[str, Tensor], convention: Convention) -> Weights:
        """Weights with which the family's model predicts what it is to predict."""
        return dict(weights)

    def convert_settings(self, args: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
        """A run's settings under haste's names."""
        return dict(args)

    def guided_channels(self, convention: Convention, channels: int) -> int | None:
        """How many of the channels, the first ones, the authors' sampler guides; None for all."""
        return None


class Family(ABC):
    """A kind of model.

    name: the key "family" of a config. title: how sentences call a model of it, such as "SiT".
    sizes: the arguments behind each published name, which `--model` takes.
    settings: those of OWN_SETTINGS that its models have, and of SIZES that not every size has, with their defaults;
        others are refused.
    fixed: settings of training of which its models know one value alone.
    published_alignment: HASTE's layers, by the part of those names before the slash.
    foreign: how to read the checkpoints of other trainers.
    prediction: what its models predict, "v" for the velocity or "noise" (`haste.diffusion`), by which samplers go; an
        attribute of its modules, too.
    in_parts: images are made in parts, by `solve.parts` (`haste.samplers.Solver`), be it of one part.

    A config is a dictionary of plain values, which checkpoints hold.
    """

    name: str
    title: str
    sizes: Mapping[str, dict[str, Any]]
    settings: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    published_alignment: Mapping[str, PublishedAlignment] = {}
    foreign: ForeignCheckpoints = ForeignCheckpoints()
    prediction: Literal["v", "noise"] = "v"
    in_parts: bool = False

    # ---- the model ----

    @abstractmethod
    def build(self, config: dict[str, Any], z_dims: Sequence[int] = ()) -> nn.Module:
        """A new model.

        It is called model(x, t, condition, aligned_layers=(), project=False) and returns a ModelOutput. In eval mode it
        drops no condition. With tokens_after=n the output has the `tokens` after block n, counted from 1, which
        Dispersive Loss needs. Its projectors, one per z_dim, are the ModuleList `projectors`, and no other parameter
        depends on whether there are any.

        Args:
            config: as `config_for` makes it.
            z_dims: the width of each teacher's features; empty without projectors.
        """

    @abstractmethod
    def config_for(self, size: Mapping[str, Any], settings: Any, data: Any) -> dict[str, Any]:
        """The config of a new run's model.

        Args:
            size: the arguments of a published name, or others.
            settings: a TrainConfig, resolved.
            data: what is trained on; it has `channels`, `input_size` and `num_classes`.
        """

    def checked(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The config that a file holds, without "family" and what else is not this family's.

        Raises:
            UserError: values that no model can have; names `source`.
        """
        return {name: value for name, value in config.items() if name != "family"}

    def check_start(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> None:  # noqa: B027 - may be nothing
        """Refuse weights of the config `other` whose shapes fit a model of `config`, but which mean something else in
        it. Replace it where there are such.

        Raises:
            UserError: names the flag of the training run.
        """

    def depth(self, size: Mapping[str, Any]) -> int:
        """Layers with attention, of a size's arguments or of a config."""
        return size["depth"]

    @abstractmethod
    def layout(self, config: Mapping[str, Any]) -> Layout: ...

    def for_sampling(self, config: Mapping[str, Any], fused_attn: bool = True) -> dict[str, Any]:
        """The config of the same model where the packages and the hardware of its training may be absent.

        fused_attn: False computes attention step by step, where the family can.
        """
        return dict(config)

    def training_flops(self, config: Mapping[str, Any]) -> int | None:
        """Floating-point operations of forward and backward for one image; None if nobody has counted them."""
        return None

    def dropout(self, config: Mapping[str, Any]) -> float:
        """The probability of dropout inside the model, not of its condition.

        Above 0 the model is trained in training mode, in which it must drop no condition itself; else in eval mode.
        """
        return config.get("dropout") or 0.0

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The blocks in the order in which they run: what is compiled, sharded and probed one by one."""
        return model.blocks

    def size_name(self, config: Mapping[str, Any]) -> str:
        """The published name of a config's size, or a description of it."""
        fitting = [name for name, size in self.sizes.items() if size.items() <= config.items()]
        if fitting:  # a SiT-XL/1 with all switches of LightningDiT-XL/1 is that one
            return max(fitting, key=lambda name: len(self.sizes[name]))
        size = next(iter(self.sizes.values()))
        return f"a {self.title} of {', '.join(f'{key} {config.get(key)}' for key in sorted(size))}"

    # ---- a training step ----

    def condition(self, labels: Tensor) -> Tensor:
        """What the model is given, of the labels (B,) int64, or of what the data has in their place."""
        return labels

    def set_null(self, model: nn.Module, null: Tensor | None) -> None:  # noqa: B027 - may be nothing
        """Give the model the condition of one image that stands for none, where the data has it and the weights do not,
        such as the features of an empty caption; None: there is none."""

    def null(self, model: nn.Module) -> Tensor | None:
        """The condition of one image that stands for none; None if the model has been built without."""
        return None

    def drop(self, model: nn.Module, condition: Tensor, dropped: Tensor) -> Tensor:
        """The condition with the null in the rows that are dropped, (B,) bool."""
        null = self.null(model)
        if null is None:
            return condition
        rows = dropped.view(-1, *[1] * (condition.dim() - 1))
        return torch.where(rows, null.to(condition), condition)

    def sample_times(
        self,
        model: nn.Module,
        batch: int,
        weighting: str,
        path: str,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Times to train at, (batch, ...), float32."""
        return transport.sample_time(batch, weighting, path, device=device, generator=generator)

    def noise_shape(self, model: nn.Module, x: Tensor) -> tuple[int, ...]:
        """The shape of the noise for `interpolate`, of as many images as x has: as `Layout.noise_shape`."""
        return tuple(x.shape)

    def time(self, share: float) -> float:
        """The time of the model at a share of the way from data (0) to noise (1)."""
        return share

    def interpolate(self, model: nn.Module, x: Tensor, noise: Tensor, t: Tensor, path: str) -> tuple[Tensor, Any]:
        """x at time t, and what `loss` compares the model's prediction with; t (B,) or as `sample_times` gives it."""
        return transport.interpolate(x, noise, t, path)

    def loss(self, predicted: Tensor, target: Any) -> Tensor:
        """The loss without alignment, a scalar of at least float32.

        Args:
            predicted: what the model returned.
            target: as `interpolate` gives it.
        """
        return transport.velocity_loss(predicted, target)

    def class_token_loss(self, predicted: Tensor, target: Any) -> Tensor | None:
        """The loss of the class token, a scalar of at least float32; None where none is denoised.

        Args:
            predicted, target: as for `loss`, which does without the class token.
        """
        return None

    # ---- sampling and caching ----

    def sample(self, model: nn.Module, noise: Tensor, condition: Tensor, solve: Solver) -> Tensor:
        """x (B, C, H, W) of noise of that shape, or of the layout's `noise_shape`.

        A family that makes an image in parts gives `solve.parts` an engine that evaluates them, and takes a `PartCache`
        in place of the model, which it finds in it.
        """
        return solve(model, noise, condition)

    def sampling_cost(
        self, model: nn.Module, solve: Solver, images: int, cache: PartCache | None = None
    ) -> SamplingCost | None:
        """What sampling takes with these settings; None if nobody has counted it.

        Args:
            images: at once.
            cache: with which it would run.
        """
        return None

    def cached(self, model: nn.Module) -> CachedTransformer | None:
        """The model as caches take it apart; None: only its output can be cached, with `--granularity output`."""
        return None

    # ---- files of others ----

    def infer_config(self, weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any] | None:
        """The config of weights that another trainer saved without one; None if they are not of this family.

        Args:
            weights: by name.
            args: the settings of the run that wrote them; may be empty.

        Raises:
            UserError: they are of this family, and of no size that can be.
        """
        return None
