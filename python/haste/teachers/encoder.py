"""A frozen vision transformer that shows its attention and its features."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from haste.errors import UserError
from haste.teachers.families import Family, Normalisation, find_family, find_layers, resolve_teacher
from haste.teachers.loading import (
    NaFlexPatches,
    load_config,
    load_normalisation,
    own_image_size,
    patch_size_of,
    resample_positions,
    resample_tokens,
)
from haste.weights import loading_arguments, reason

# ---- q and k of any transformers model ----

ATTENTION_NAME = "haste_recording_sdpa"

QueriesKeys = tuple[Tensor, Tensor]


class Recording:
    """The q and k that the wanted attention modules used, by layer index."""

    def __init__(self, layer_of_module: dict[nn.Module, int]) -> None:
        self._layer_of_module = layer_of_module
        self.queries_keys: dict[int, QueriesKeys] = {}

    def keep(self, module: nn.Module, query: Tensor, key: Tensor) -> None:
        layer = self._layer_of_module.get(module)
        if layer is not None:
            self.queries_keys[layer] = (query, key)


# A context variable and not an attribute of the modules: several teachers, threads and other users of the same
# transformers model never see each other's recordings.
_active: ContextVar[Recording | None] = ContextVar("haste_active_recording", default=None)


@contextmanager
def record(layer_of_module: dict[nn.Module, int]) -> Iterator[Recording]:
    """Record the listed attention modules while the context is open."""
    recording = Recording(layer_of_module)
    token = _active.set(recording)
    try:
        yield recording
    finally:
        _active.reset(token)


def _recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
) -> tuple[Tensor, None]:
    recording = _active.get()
    if recording is not None:
        recording.keep(module, query, key)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _recording_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


# ---- the teacher ----

GridRule = Literal["match", "interpolate"]
"""Where the teacher's own grid of tokens is not the student's. match: the images are resized until it is, and the
teacher's positions are resampled to it, as HASTE and REPA do. interpolate: the teacher sees images of its own size,
or of the size asked for, and its queries, keys and features are interpolated over the grid."""


@dataclass
class TeacherOutput:
    """What one teacher returns for one batch, on the student's grid of N tokens.

    queries_keys: for each of its `layers`, in that order, (q, k), each (B, H, prefix + N, D).
    prefix: number of leading class and register tokens in q and k.
    patch_tokens: (B, N, C), the last layer's patch tokens after the final norm, without the prefix; None without
        `features`. CLIP and MAE give them before the norm, as in REPA.
    """

    queries_keys: list[QueriesKeys]
    prefix: int
    patch_tokens: Tensor | None


class VisionTeacher(nn.Module):
    """Runs the encoder without gradient, in eval mode, on the student's own images.

    Make one with `from_pretrained`. The images are resized (bicubic, as HASTE and REPA do) and normalised with the
    encoder's own mean and standard deviation.

    grid: tokens per side that the encoder has at `image_size` pixels.
    student_grid: tokens per side of what it gives out; where they differ, it is interpolated.
    """

    def __init__(
        self,
        name: str,
        encoder: nn.Module,
        family: Family,
        layers: Sequence[int],
        image_size: int,
        grid: int,
        student_grid: int,
        normalisation: Normalisation,
        features: bool = True,
    ) -> None:
        super().__init__()
        config = encoder.config
        blocks = find_layers(encoder, config.num_hidden_layers)
        if not features:
            # Nothing after the last recorded layer is needed, so it need not exist.
            del blocks[max(layers) + 1 :]
        self.name = name
        self.encoder = encoder.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.features = features
        self.image_size = image_size
        self.grid = grid
        self.student_grid = student_grid
        self.prefix = family.prefix_tokens(config)
        self.width: int = config.hidden_size
        self.num_heads: int = config.num_attention_heads
        self.num_channels: int = config.num_channels
        self._family = family
        self._layer_of_module = {module: layer for layer in set(layers) for module in blocks[layer].modules()}
        self.register_buffer("mean", torch.tensor(normalisation.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(normalisation.std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        layers: Sequence[int] = (),
        grid: int | None = None,
        image_size: int | None = None,
        features: bool = True,
        grid_rule: GridRule = "match",
    ) -> VisionTeacher:
        """Load a teacher.

        Args:
            name: a local folder, a hub name, or one of HASTE's and REPA's short names.
            layers: whose q and k are returned, from 0.
            grid: tokens per side that the student has. None: as many as the teacher has.
            image_size: pixels per side that the teacher sees. Default: grid x patch size, or the encoder's own size
                when no grid is given or when tokens are interpolated.
            features: return the final patch tokens; without them, later layers are dropped.
            grid_rule: what to do where the two grids differ.

        Raises:
            UserError: a folder that is missing or no model, an unknown family, a layer that the encoder does not have,
                an image_size that does not fit.
            ValueError: neither layers nor features.
        """
        source = resolve_teacher(name)
        config = load_config(name, source)
        family = find_family(name, config)
        _check_layers(name, layers, config.num_hidden_layers)
        if not layers and not features:
            raise ValueError("a teacher without layers and without features has nothing to do")
        image_size = _choose_image_size(name, config, grid, image_size, grid_rule)
        own = image_size // patch_size_of(name, config)
        return cls(
            name,
            _load_encoder(name, source, family, own),
            family,
            layers,
            image_size,
            grid=own,
            student_grid=own if grid is None else grid,
            normalisation=load_normalisation(name, source, family, config.num_channels),
            features=features,
        )

    def train(self, mode: bool = True) -> VisionTeacher:
        """A teacher stays in eval mode, whatever its owner does."""
        return super().train(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, num_channels, image_size, image_size), normalised."""
        if images.shape[1] == 1 and self.num_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.num_channels:
            raise UserError(
                f"the images have {images.shape[1]} channels and the teacher takes {self.num_channels}; "
                "they must agree, or the images must be grey"
            )
        images = ((images + 1) / 2 - self.mean) / self.std
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic")
        return images

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """q, k and features of images (B, C, H, W), float, in [-1, 1], of any size."""
        pixels = self.preprocess(images)
        arguments = self._family.forward_arguments(pixels, self.grid**2)
        with record(self._layer_of_module) as recording:
            tokens = self.encoder(pixels, **arguments).last_hidden_state
        output = TeacherOutput(
            queries_keys=[recording.queries_keys[layer] for layer in self.layers],
            prefix=self.prefix,
            patch_tokens=tokens[:, self.prefix :] if self.features else None,
        )
        return output if self.grid == self.student_grid else self._interpolate(output)

    def _interpolate(self, output: TeacherOutput) -> TeacherOutput:
        """The same on the student's grid. The prefix has no place on a grid and is left out."""

        def resample(tokens: Tensor) -> Tensor:
            return resample_tokens(tokens, self.grid, self.student_grid)

        pairs = [(q[:, :, self.prefix :], k[:, :, self.prefix :]) for q, k in output.queries_keys]
        return TeacherOutput(
            queries_keys=[(resample(q), resample(k)) for q, k in pairs],
            prefix=0,
            patch_tokens=None if output.patch_tokens is None else resample(output.patch_tokens),
        )

    def describe(self) -> str:
        """What it sees and what becomes of its tokens, in a few words."""
        size, grid, wanted = self.image_size, self.grid, self.student_grid
        tokens = f"{grid} x {grid} tokens" + (f" interpolated to {wanted} x {wanted}" if grid != wanted else "")
        return f"{self.name} ({size} x {size} pixels, {tokens})"


def _load_encoder(name: str, source: str, family: Family, grid: int) -> nn.Module:
    """The encoder with positions for grid x grid patches, and without the parts that a teacher does not use."""
    try:
        with _without_report():
            model, info = AutoModel.from_pretrained(
                source,
                attn_implementation=ATTENTION_NAME,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # else transformers advises to set this; refused below, with the shapes
                **loading_arguments(source),
            )
    except Exception as error:  # transformers', safetensors', the hub's own errors
        raise UserError(f"the teacher {name} cannot be loaded: {reason(error)}") from error
    encoder = getattr(model, "vision_model", model)  # the text side of a two-tower model is dropped here
    family.strip(encoder)
    _refuse_other_shapes(name, encoder, info["mismatched_keys"])
    _refuse_missing_weights(name, encoder, info["missing_keys"])
    if family.takes_patches:
        encoder.embeddings = NaFlexPatches(encoder.embeddings, grid)
    else:
        own = own_image_size(name, encoder.config) // patch_size_of(name, encoder.config)
        resample_positions(encoder.embeddings, own, grid)
    return encoder


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of weights that do not fit, on its log: those of the encoder are refused below, and
    the others, such as a text side's, are not used."""
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_is_no_report)  # another level would let it say more elsewhere
    try:
        yield
    finally:
        log.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _refuse_missing_weights(name: str, encoder: nn.Module, missing: Iterable[str]) -> None:
    """transformers draws weights that a checkpoint lacks at random, which here would teach nonsense."""
    lacking = sorted(_own_weights(encoder) & {key.removeprefix("vision_model.") for key in missing})
    if lacking:
        raise UserError(f"the teacher {name} lacks {len(lacking)} weights of its encoder, such as {lacking[0]}")


def _refuse_other_shapes(
    name: str, encoder: nn.Module, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]
) -> None:
    """Of those, too, it draws new ones. mismatched: name, shape in the file, and shape that config.json asks for."""
    shapes = {key.removeprefix("vision_model."): shapes for key, *shapes in mismatched}
    for key in sorted(_own_weights(encoder) & shapes.keys()):
        found, wanted = (" x ".join(map(str, shape)) for shape in shapes[key])
        raise UserError(f"the teacher {name} cannot be loaded: its weight {key} is {found}; its config.json asks for "
                        f"{wanted}")  # fmt: skip


def _own_weights(encoder: nn.Module) -> set[str]:
    return {parameter for parameter, _ in encoder.named_parameters()}


def _check_layers(name: str, layers: Sequence[int], depth: int) -> None:
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise UserError(
            f"the layer map asks for layer {outside[0]} of the teacher {name}, which has {depth} layers; "
            f"teacher layers must be 0 to {depth - 1}"
        )


def _choose_image_size(
    name: str, config: PretrainedConfig, grid: int | None, image_size: int | None, grid_rule: GridRule
) -> int:
    patch = patch_size_of(name, config)
    match = grid is not None and grid_rule == "match"
    if image_size is None:
        return grid * patch if match else own_image_size(name, config)
    if image_size < 1 or image_size % patch:
        raise UserError(f"--teacher-resolution is {image_size}; it must be a multiple of {patch}, the patch of {name}")
    own = image_size // patch
    if match and own != grid:
        raise UserError(
            f"the teacher {name} at {image_size} pixels has {own} x {own} tokens and the student has {grid} x {grid}; "
            f"--teacher-resolution {grid * patch} would fit, or --teacher-grid interpolate"
        )
    return image_size
