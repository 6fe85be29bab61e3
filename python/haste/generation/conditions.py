"""What images are sampled of: the classes of --labels, or the captions of --prompts.

Image i has a condition of its own, whatever the others of its batch are. So texts are encoded in batches that are fixed
by their numbers, and which caption of an image of a data set is taken is random by the seed and i.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from haste.errors import BadFile, UserError, shorten
from haste.generation.config import SamplingConfig
from haste.generation.prompts import prompt_folder, prompt_texts
from haste.registry import ENCODERS
from haste.samplers.labels import NONE, POLICIES, UNLABELLED, choose_labels, image_generator, number_labels
from haste.text import CLIP_L, TextEncoder, TextFormat

if TYPE_CHECKING:
    from haste.data.caption_store import CaptionStore
    from haste.generation.loaded import LoadedCheckpoint

TEXTS_AT_ONCE = 32  # that are encoded
BATCHES_KEPT = 64  # of their features, each 7.6 MB for CLIP-L

T = TypeVar("T")

Texts = list[str | None]
"""A caption for each image; None where only its features are known."""


class Conditions(Protocol):
    """The conditions of images by number.

    null: the condition of one image that stands for none; None if the model has none.
    truncated: texts that were longer than the encoder takes, so far.
    """

    null: Tensor | None

    @property
    def truncated(self) -> int: ...

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        """Classes (n,) int64; UNLABELLED for images of no class."""

    def captions(self, indices: Sequence[int]) -> Texts | None:
        """The captions of images of text; None of classes."""

    def of(self, indices: Sequence[int]) -> Tensor:
        """What the model is given, (n, ...), on the CPU."""

    def record(self) -> dict[str, Any]:
        """What decides the conditions beside the settings and the checkpoint, as plain values."""


def open_conditions(loaded: LoadedCheckpoint, settings: SamplingConfig) -> Conditions:
    """The conditions of the settings for a model; `check_condition` must have passed.

    Raises:
        UserError: labels, prompts, or an encoder that the model cannot have; guidance without a null condition.
    """
    if loaded.layout.condition_shape is None:
        return ClassConditions(loaded, settings)
    folder = prompt_folder(settings.prompts)
    conditions = PromptConditions(loaded, settings) if folder is None else DataConditions(loaded, settings, folder)
    if settings.cfg_scale > 1:
        check_guidance(loaded, settings)
        conditions.require_null()
    return conditions


def check_condition(settings: SamplingConfig, loaded: LoadedCheckpoint) -> None:
    """Raise UserError for labels of a model of text, and for prompts of a model of classes."""
    title = loaded.family.title
    if loaded.layout.condition_shape is not None:
        if settings.labels not in POLICIES:
            found = shorten(settings.labels)
            raise UserError(f"--labels must be left out for this {title}, a model of text (see --prompts), got {found}")
        return
    for flag, given in (("prompts", settings.prompts.strip()), ("text-encoder", settings.text_encoder)):
        if given:
            found = shorten(given)
            raise UserError(
                f"--{flag} must be left out for this {title}, a model of classes (see --labels), got {found}"
            )


def check_guidance(loaded: LoadedCheckpoint, settings: SamplingConfig) -> None:
    """Raise UserError for guidance of a model that was trained without the null condition."""
    if settings.cfg_scale > 1 and loaded.config.cfg_prob == 0:
        raise UserError(f"--cfg-scale must be 1 for a model trained with --cfg-prob 0, got {settings.cfg_scale:g}")


# ---- classes ----


class ClassConditions:
    """Classes by --labels."""

    truncated = 0

    def __init__(self, loaded: LoadedCheckpoint, settings: SamplingConfig) -> None:
        self.null = loaded.family.null(loaded.model)
        if settings.cfg_scale > 1 and self.null is None:
            raise UserError(f"--cfg-scale must be 1 for a model trained with --cfg-prob 0, got {settings.cfg_scale:g}")
        if settings.labels == NONE and self.null is None:
            raise UserError("--labels must be classes for a model trained with --cfg-prob 0, got none")
        self._family, self._count = loaded.family, loaded.num_classes
        self._policy = number_labels(settings.labels, loaded.class_names)
        self._seed = settings.global_seed

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        return choose_labels(self._policy, self._seed, indices, self._count)

    def captions(self, indices: Sequence[int]) -> None:
        return None

    def record(self) -> dict[str, Any]:
        return {}

    def of(self, indices: Sequence[int]) -> Tensor:
        if self._policy != NONE or self.null is None:
            return self._family.condition(torch.from_numpy(self.labels(indices)))
        return self.null.expand(len(indices), *self.null.shape).contiguous()


# ---- texts ----


class TextConditions:
    """What the two kinds of captions have in common: a shape, an encoder, and the features of the empty caption."""

    def __init__(self, loaded: LoadedCheckpoint, settings: SamplingConfig) -> None:
        assert loaded.layout.condition_shape is not None  # as `open_conditions` has checked
        self.shape = loaded.layout.condition_shape
        self.null = loaded.family.null(loaded.model)
        self._loaded, self._given = loaded, settings.text_encoder
        self._encoder: TextEncoder | None = None

    def labels(self, indices: Sequence[int]) -> np.ndarray:
        return np.full(len(indices), UNLABELLED, dtype=np.int64)

    def record(self) -> dict[str, Any]:
        return {}

    def require_null(self) -> None:
        """The null condition of a model that has none recorded is the empty caption's."""
        if self.null is None:
            self.null = self._encode([""])[0]

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Features (n, tokens, width), float32 on the CPU, by the encoder, which is loaded when it is first used."""
        if self._encoder is None:
            device = next(self._loaded.model.parameters()).device
            self._encoder = TextEncoder(text_format(self._loaded, self._given)).to(device)
        return self._encoder.encode(list(texts)).cpu()


class PromptConditions(TextConditions):
    """Texts that images cycle through, encoded when they are first used; the encoder is freed when all are."""

    def __init__(self, loaded: LoadedCheckpoint, settings: SamplingConfig) -> None:
        super().__init__(loaded, settings)
        self.texts: Sequence[str] = prompt_texts(settings.prompts) or loaded.captions
        if not self.texts:
            raise UserError(
                f"--prompts must be given for {loaded.checkpoint}, which records no captions of its data, got none"
            )
        text_format(loaded, settings.text_encoder)  # refuses one that does not fit before anything is sampled
        self._kept: dict[int, Tensor] = {}
        self._truncated: dict[int, int] = {}

    @property
    def truncated(self) -> int:
        """How many of the texts encoded so far had more tokens than the encoder takes."""
        return sum(self._truncated.values())

    def captions(self, indices: Sequence[int]) -> Texts:
        return [self.texts[index % len(self.texts)] for index in indices]

    def of(self, indices: Sequence[int]) -> Tensor:
        places = [divmod(index % len(self.texts), TEXTS_AT_ONCE) for index in indices]
        batches = {number: self._batch(number) for number in sorted({number for number, _ in places})}
        return torch.stack([batches[number][row] for number, row in places])

    def _batch(self, number: int) -> Tensor:
        """The features of one batch of texts."""
        if number not in self._kept:
            start = number * TEXTS_AT_ONCE
            before = 0 if self._encoder is None else self._encoder.truncated
            self._kept[number] = self._encode(self.texts[start : start + TEXTS_AT_ONCE])
            assert self._encoder is not None
            self._truncated[number] = self._encoder.truncated - before
        features = self._kept[number]
        if len(self._kept) > BATCHES_KEPT:
            del self._kept[next(iter(self._kept))]  # the one that was encoded first
        if len(self._kept) * TEXTS_AT_ONCE >= len(self.texts):
            self._encoder = None  # nothing is left to encode
        return features


class DataConditions(TextConditions):
    """The captions of a data set: of each image one at random, in the order of the images."""

    truncated = 0

    def __init__(self, loaded: LoadedCheckpoint, settings: SamplingConfig, folder: Path) -> None:
        from haste.data.captions import open_captions

        super().__init__(loaded, settings)
        self.data: CaptionStore = open_captions(folder, "--prompts")
        self._seed = settings.global_seed
        found = (self.data.text.tokens, self.data.text.width)
        if found != self.shape:
            wanted, got = (f"{tokens} tokens of {width} numbers" for tokens, width in (self.shape, found))
            raise UserError(f"--prompts must be features of {wanted}, as the model's, got {folder} with {got}")
        if settings.text_encoder is not None:
            given = settings.text_encoder
            raise UserError(
                f"--text-encoder must be left out with features, as those of --prompts {folder}, got {given}"
            )
        if self.null is None:
            self.null = self.data.null

    def captions(self, indices: Sequence[int]) -> Texts:
        return self._read(lambda index: self.data.sentence(*self._place(index)), indices)

    def of(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(self._read(lambda index: self.data.caption(*self._place(index))[1], indices))

    def record(self) -> dict[str, Any]:
        """What identifies the data, beside the name of the folder."""
        found = json.dumps(self.data.fingerprint(), sort_keys=True)
        return {"prompts_digest": hashlib.sha256(found.encode()).hexdigest()[:12]}

    def _read(self, read: Callable[[int], T], indices: Sequence[int]) -> list[T]:
        try:
            return [read(index) for index in indices]
        except BadFile as fault:
            raise UserError(f"{fault}; --prompts needs all captions of its images") from fault

    def _place(self, index: int) -> tuple[int, int]:
        """The image of the data and which of its captions."""
        number = index % len(self.data)
        generator = image_generator(self._seed, index, "label")
        return number, int(torch.randint(self.data.count(number), (), generator=generator))


def text_format(loaded: LoadedCheckpoint, given: str | None) -> TextFormat:
    """The format of a model's captions, encoded by --text-encoder, or else by the encoder of training.

    Raises:
        UserError: an encoder of another width, or of fewer tokens, than the model's.
    """
    tokens, width = loaded.layout.condition_shape or (0, 0)
    if given is None and loaded.text is not None:
        return replace(loaded.text, encoder=find_encoder(loaded.text.encoder, loaded.run))
    found = CLIP_L if given is None else TextFormat.of(given)
    if found.width != width or found.tokens < tokens:
        flag = "--text-encoder must be given, one" if given is None else "--text-encoder must be one"
        raise UserError(
            f"{flag} of {tokens} tokens of {width} numbers, as the model's captions, got {found.encoder} of "
            f"{found.tokens} tokens of {found.width}"
        )
    return TextFormat(found.encoder, tokens, width)


def find_encoder(recorded: str, run: Path) -> str:
    """A recorded encoder; of a folder that is no more, the one of its name that moved with the run, in encoders/ beside
    it, where training keeps those that it makes."""
    moved = run.resolve().parent / ENCODERS / Path(recorded).name
    is_gone = Path(recorded).is_absolute() and not Path(recorded).exists()
    return str(moved) if is_gone and moved.is_dir() else recorded
