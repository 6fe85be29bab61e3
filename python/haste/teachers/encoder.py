"""A frozen vision transformer that returns its attention and its features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PretrainedConfig

from haste._compat import sdpa_attention, without_load_report
from haste.errors import UserError
from haste.io import loading_arguments
from haste.teachers.families import FAMILIES, Family, Normalisation, find_family, find_layers, resolve_teacher
from haste.teachers.loading import (
    NaFlexPatches,
    load_config,
    load_normalisation,
    own_image_size,
    patch_size_of,
    resample_positions,
    resample_tokens,
)
from haste.weights import reason

# ---- q and k of any transformers model ----

# transformers calls every attention layer through a table of functions. Our entry hands q and k, after rotary embedding
# and before softmax, to the active recording, and then calls SDPA. No model is patched.

ATTENTION_NAME = "haste_recording_sdpa"

QueriesKeys = tuple[Tensor, Tensor]

sdpa_attention_forward, sdpa_mask = sdpa_attention()


class Recording:
    """The q and k of the listed attention modules, by layer index."""

    def __init__(self, layer_of_module: dict[nn.Module, int]) -> None:
        self.layer_of_module = layer_of_module
        self.queries_keys: dict[int, QueriesKeys] = {}


# A context variable and no attribute of the modules: several teachers, threads and other users of the same model never
# see each other's recordings.
_active: ContextVar[Recording | None] = ContextVar("haste_active_recording", default=None)


@contextmanager
def record(layer_of_module: dict[nn.Module, int]) -> Iterator[Recording]:
    """Record q and k while the context is open."""
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
    if recording is not None and module in recording.layer_of_module:
        recording.queries_keys[recording.layer_of_module[module]] = (query, key)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _recording_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


# ---- the teacher ----

GridRule = Literal["match", "interpolate", "interpolate-student"]
"""What to do if the teacher's own grid of tokens is not the student's. match: resize the images until it is, and
resample the teacher's positions, as HASTE and REPA do. interpolate: keep the teacher's own image size, or the one asked
for, and interpolate its queries, keys and features over the grid. interpolate-student: keep them, and leave it to the
loss to interpolate the student's, as HASTE does for other grids."""


@dataclass
class TeacherOutput:
    """What a teacher returns for a batch, on the student's grid of N tokens, or with interpolate-student on its own.

    Attributes:
        queries_keys: (q, k) of each of its `layers`, in that order, each (B, H, prefix + N, D).
        prefix: number of leading class and register tokens in q and k.
        patch_tokens: (B, N, C), the last layer's patch tokens after the final norm, without the prefix; before the
            norm for CLIP and MAE, as in REPA. None without `features`.
        class_token: (B, C), the last layer's class token after the final norm; before it for MAE. None without
            `class_token`.
    """

    queries_keys: list[QueriesKeys]
    prefix: int
    patch_tokens: Tensor | None
    class_token: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """What a projected hidden state is compared with: the patch tokens, behind the class token if there is one."""
        assert self.patch_tokens is not None
        if self.class_token is None:
            return self.patch_tokens
        return torch.cat([self.class_token.unsqueeze(1), self.patch_tokens], dim=1)


class VisionTeacher(nn.Module):
    """A frozen encoder. Always in eval mode and without gradient. Use `from_pretrained` to create one.

    Images are resized (bicubic, as HASTE and REPA do) and normalised with the encoder's own mean and deviation.

    Args:
        grid: tokens per side that the encoder has at `image_size` pixels.
        student_grid: tokens per side of the output, which is interpolated if the two differ.
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
        class_token: bool = False,
    ) -> None:
        super().__init__()
        config = encoder.config
        blocks = find_layers(encoder, config.num_hidden_layers)
        if not features and not class_token:
            del blocks[max(layers) + 1 :]  # nothing reads their output
        self.name = name
        self.encoder = encoder.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.features = features
        self.class_token = class_token
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
        class_token: bool = False,
    ) -> VisionTeacher:
        """Load a teacher.

        Args:
            name: a local folder, a hub name, or one of HASTE's and REPA's short names.
            layers: whose q and k are returned, from 0.
            grid: tokens per side that the student has. None: the teacher's.
            image_size: pixels per side that the teacher sees. Default: grid x patch size, or the encoder's own size
                when no grid is given or when tokens are interpolated.
            features: return the final patch tokens; without them, later layers are dropped.
            grid_rule: what to do if the two grids differ.
            class_token: return the class token as well.

        Raises:
            UserError: a folder that is missing or no model, an unknown family, a layer that the encoder does not have,
                an image_size that does not fit, a class token of an encoder without one.
            ValueError: neither layers nor features nor class token.
        """
        source = resolve_teacher(name)
        config = load_config(name, source)
        family = find_family(name, config)
        for layer in layers:
            if not 0 <= layer < config.num_hidden_layers:
                last = config.num_hidden_layers - 1
                raise UserError(f"--layer-map must name layers from 0 to {last} of the teacher {name}, got {layer}")
        if not layers and not features and not class_token:
            raise ValueError("a teacher must return layers or features, got neither")
        if class_token and not family.class_tokens:
            having = ", ".join(name for name, known in FAMILIES.items() if known.class_tokens)
            raise UserError(f"--enc-type must be a teacher with a class token for --cls-coeff, of one of the families "
                            f"{having}, got {name}, which has none")  # fmt: skip
        image_size = _choose_image_size(name, config, grid, image_size, grid_rule)
        own = image_size // patch_size_of(name, config)
        return cls(
            name,
            _load_encoder(name, source, family, own),
            family,
            layers,
            image_size,
            grid=own,
            student_grid=own if grid is None or grid_rule == "interpolate-student" else grid,
            normalisation=load_normalisation(name, source, family, config.num_channels),
            features=features,
            class_token=class_token,
        )

    def return_class_token_alone(self) -> None:
        """From now on record and return nothing else."""
        self.layers, self._layer_of_module, self.features = (), {}, False

    def train(self, mode: bool = True) -> VisionTeacher:
        """A teacher stays in eval mode, whatever the mode of the module that holds it."""
        return super().train(False)

    def takes(self, channels: int) -> bool:
        """Whether images with this many channels can be given; grey ones count as colored."""
        return channels == self.num_channels or (channels, self.num_channels) == (1, 3)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, num_channels, image_size, image_size), normalised."""
        if images.shape[1] == 1 and self.num_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if not self.takes(images.shape[1]):
            raise UserError(f"images must have 1 channel or the teacher's {self.num_channels}, got {images.shape[1]}")
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
            encoded = self.encoder(pixels, **arguments)
        tokens = encoded.last_hidden_state
        output = TeacherOutput(
            queries_keys=[recording.queries_keys[layer] for layer in self.layers],
            prefix=self.prefix,
            patch_tokens=tokens[:, self.prefix :] if self.features else None,
            class_token=self._class_token(encoded) if self.class_token else None,
        )
        return output if self.grid == self.student_grid else self._interpolate(output)

    def _class_token(self, encoded: Any) -> Tensor:
        return encoded.pooler_output if self._family.pools_class_token else encoded.last_hidden_state[:, 0]

    def _interpolate(self, output: TeacherOutput) -> TeacherOutput:
        """The same on the student's grid, without the prefix, which has no place on a grid."""

        def resample(tokens: Tensor) -> Tensor:
            return resample_tokens(tokens, self.grid, self.student_grid)

        pairs = [(q[:, :, self.prefix :], k[:, :, self.prefix :]) for q, k in output.queries_keys]
        return TeacherOutput(
            queries_keys=[(resample(q), resample(k)) for q, k in pairs],
            prefix=0,
            patch_tokens=None if output.patch_tokens is None else resample(output.patch_tokens),
            class_token=output.class_token,
        )

    def describe(self) -> str:
        """Name, image size and grid of tokens, for the log."""
        size, grid, wanted = self.image_size, self.grid, self.student_grid
        tokens = f"{grid} x {grid} tokens" + (f" interpolated to {wanted} x {wanted}" if grid != wanted else "")
        return f"{self.name} ({size} x {size} pixels, {tokens})"


def _load_encoder(name: str, source: str, family: Family, grid: int) -> nn.Module:
    """The encoder with positions for grid x grid patches, and without the parts that a teacher does not use."""
    try:
        with without_load_report():  # it also lists weights that are not used, such as a text side's
            model, info = AutoModel.from_pretrained(
                source,
                attn_implementation=ATTENTION_NAME,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below, with their shapes
                **loading_arguments(source),
            )
    except Exception as error:  # transformers', safetensors', the hub's own errors
        raise UserError(f"the teacher {name} cannot be loaded: {reason(error)}") from error
    encoder = getattr(model, "vision_model", model)  # the text side of a two-tower model is dropped here
    family.strip(encoder)
    # transformers initializes weights that do not fit or are missing at random, which would make a useless teacher.
    own = {parameter for parameter, _ in encoder.named_parameters()}
    for key, found, wanted in sorted(info["mismatched_keys"]):
        weight = key.removeprefix("vision_model.")
        if weight in own:
            has, needs = (" x ".join(map(str, shape)) for shape in (found, wanted))
            raise UserError(f"{weight} of the teacher {name} must be {needs} by its config.json, got {has}")
    lacking = sorted(own & {key.removeprefix("vision_model.") for key in info["missing_keys"]})
    if lacking:
        raise UserError(f"the teacher {name} lacks {len(lacking)} weights of its encoder, such as {lacking[0]}")
    if family.takes_patches:
        encoder.embeddings = NaFlexPatches(encoder.embeddings, grid)
    else:
        own_grid = own_image_size(name, encoder.config) // patch_size_of(name, encoder.config)
        resample_positions(encoder.embeddings, own_grid, grid)
    return encoder


def _choose_image_size(
    name: str, config: PretrainedConfig, grid: int | None, image_size: int | None, grid_rule: GridRule
) -> int:
    patch = patch_size_of(name, config)
    wanted = grid if grid_rule == "match" else None
    if image_size is None:
        return own_image_size(name, config) if wanted is None else wanted * patch
    if image_size < 1 or image_size % patch:
        raise UserError(f"--teacher-resolution must be a multiple of {patch}, the patch of {name}, got {image_size}")
    own = image_size // patch
    if wanted is not None and wanted != own:
        raise UserError(
            f"--teacher-resolution must be {wanted * patch}, at which the teacher {name} has the student's {grid} x "
            f"{grid} tokens, got {image_size}, at which it has {own} x {own}; or give --teacher-grid interpolate"
        )
    return image_size
