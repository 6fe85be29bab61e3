"""Text encoders: captions and prompts become the features that a text-to-image model is conditioned on.

    features = last_hidden_state(prompt, padded to `tokens`)      (tokens, width)

after the encoder's final norm, and without an attention mask, as in U-ViT and REPA. CLIP-L, with 77 tokens of 768, is
that of MS-COCO's public features; any text encoder of the families in `ENCODERS` serves, from a folder or by its name
on the hub.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haste._compat import cached_file_if_any, without_load_report
from haste.errors import UserError, in_one_line
from haste.io import loading_arguments, read_json, require_source
from haste.validation import build, shown
from haste.weights import reason, require_weights

logger = logging.getLogger(__name__)

# From the model_type of a config to transformers' class of the text side.
ENCODERS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip_text_model": "SiglipTextModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}

PROMPTS_AT_A_TIME = 64
UNLIMITED_TOKENS = 512  # of encoders without a longest input, such as T5, whose training had this many
MOST_TOKENS, MOST_WIDTH, MOST_LAYERS = 4096, 2**16, 1000
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
FLAG = "--text-encoder"


@dataclass(frozen=True)
class TextFormat:
    """The format of text features.

    Attributes:
        encoder: hub name or folder; empty if it is not known.
        tokens: per prompt, padded.
        width: of each token.
    """

    encoder: str
    tokens: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the features of one prompt."""
        return self.tokens, self.width

    @classmethod
    def of(cls, name: str, flag: str = FLAG) -> TextFormat:
        """The format of an encoder, by its config and tokenizer alone.

        Args:
            name: a folder of save_pretrained(), also that of a whole pipeline of diffusers, or a hub name.
            flag: that gave the name, for messages.

        Raises:
            UserError: it does not exist, is no text encoder, or has no tokenizer.
        """
        source = resolve_encoder(name, flag)
        if source == CLIP_L.encoder:  # known without the hub
            return CLIP_L
        config = _load_config(name, source, flag)
        longest = [
            _load_tokenizer(name, source, flag).model_max_length,
            getattr(config, "max_position_embeddings", None),
        ]
        known = [length for length in longest if type(length) is int and length <= MOST_TOKENS]
        text = cls(source, min(known, default=UNLIMITED_TOKENS), config.hidden_size)
        text._check(f"the text encoder {name}")
        return text

    @classmethod
    def from_dict(cls, values: Any, source: str = "the format of text features") -> TextFormat:
        """The inverse of dataclasses.asdict, also through JSON. Raises UserError, naming `source`, for other values."""
        text = build(cls, values, source)
        text._check(source)
        return text

    def _check(self, source: str) -> None:
        for name, value, most in (("tokens", self.tokens, MOST_TOKENS), ("width", self.width, MOST_WIDTH)):
            if not 1 <= value <= most:
                raise UserError(f"{name} of {source} must be from 1 to {most:,}, got {shown(value)}")


CLIP_L = TextFormat("openai/clip-vit-large-patch14", 77, 768)


class TextEncoder(nn.Module):
    """A frozen text encoder in float32, always in eval mode.

    Args:
        text: its format, such as `TextFormat.of(name)`.
        flag: that gave it, for messages.

    Attributes:
        truncated: the number of prompts so far that had more tokens than the encoder takes.

    Raises:
        UserError: the encoder cannot be loaded, or has another width or takes fewer tokens than `text`.
    """

    def __init__(self, text: TextFormat, flag: str = FLAG) -> None:
        super().__init__()
        self.text = text
        self.truncated = 0
        if not text.encoder:
            raise UserError(f"{flag} must name the encoder of these {text.tokens} x {text.width} features, got none")
        source = resolve_encoder(text.encoder, flag)
        config = _load_config(text.encoder, source, flag)
        positions = getattr(config, "max_position_embeddings", None) or text.tokens
        if config.hidden_size != text.width or positions < text.tokens:
            raise UserError(
                f"{flag} must have features of {text.tokens} x {text.width}, as the data and the model, got "
                f"{positions} x {config.hidden_size} of {text.encoder}"
            )
        self._tokenizer = _load_tokenizer(text.encoder, source, flag)
        if len(self._tokenizer) > config.vocab_size:
            raise UserError(
                f"{flag} must have a tokenizer of at most {config.vocab_size:,} tokens, as its config.json, got "
                f"{len(self._tokenizer):,} in {text.encoder}"
            )
        self._model = _load_model(text.encoder, source, flag).eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to features (n, tokens, width), float32, on the encoder's device.

        A prompt of more tokens is truncated and counted; the first is logged.
        """
        prompts = [in_utf8(prompt) for prompt in prompts]
        self._count_truncated(prompts)
        parts = [prompts[start : start + PROMPTS_AT_A_TIME] for start in range(0, len(prompts), PROMPTS_AT_A_TIME)]
        if not parts:
            return torch.empty(0, *self.text.shape, device=self.device)
        return torch.cat([self._encode(list(part)) for part in parts])

    def _encode(self, prompts: list[str]) -> Tensor:
        padded = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.text.tokens, return_tensors="pt"
        )
        # No attention mask: the padding is part of the features.
        return self._model(input_ids=padded["input_ids"].to(self.device)).last_hidden_state.float()

    def _count_truncated(self, prompts: Sequence[str]) -> None:
        lengths = [len(ids) for ids in self._tokenizer(list(prompts), verbose=False)["input_ids"]] if prompts else []
        longer = [index for index, length in enumerate(lengths) if length > self.text.tokens]
        if longer and not self.truncated:
            logger.warning(
                "prompts of more than %d tokens are truncated, as the text encoder takes no more: %s (%d tokens)",
                self.text.tokens, shown(prompts[longer[0]]), lengths[longer[0]],
            )  # fmt: skip
        self.truncated += len(longer)


def in_utf8(text: str) -> str:
    """A text with a question mark for what UTF-8 cannot hold, such as half an emoji, which JSON can."""
    return text.encode("utf-8", "replace").decode()


# ---- files ----


def resolve_encoder(name: str, flag: str = FLAG) -> str:
    """The source of an encoder: the absolute path of its folder, or a hub name. Raises UserError for anything else."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (_model_folder(folder) / "config.json").is_file():
            raise UserError(f"{flag} must be a folder of save_pretrained(), got {name}, which has no config.json")
        return str(folder.resolve())
    if name.count("/") == 1 and not name.startswith((".", "~", os.sep)) and not name.endswith("/"):
        return name
    raise UserError(
        f"{flag} must be a folder of save_pretrained() or a hub name such as {CLIP_L.encoder}, got {name!r}, which "
        "does not exist"
    )


def _model_folder(folder: Path) -> Path:
    """The folder of the weights; in that of a whole pipeline, the one of its text encoder."""
    inside = folder / "text_encoder"
    return inside if (inside / "config.json").is_file() and not (folder / "config.json").is_file() else folder


def _model_source(source: str) -> str:
    return str(_model_folder(Path(source))) if Path(source).is_dir() else source


def _load_config(name: str, source: str, flag: str) -> Any:
    """The config of the text side. Raises UserError for another kind of model."""
    require_source(name, source, flag)
    source = _model_source(source)
    what = "the config of a text encoder"
    if Path(source).is_dir():
        values = read_json(Path(source) / "config.json", what)
    else:
        found = cached_file_if_any(source, "config.json", **loading_arguments(source))
        if found is None:
            raise UserError(f"{flag} must be a text encoder, got {name}, which has no config.json")
        values = read_json(Path(found), what)
    kind = values.get("model_type")
    if kind not in ENCODERS:
        raise UserError(f"{flag} must be a text encoder of one of {', '.join(ENCODERS)}, got {shown(kind)} in {name}")
    if values.get("quantization_config") is not None:
        raise UserError(f"{flag} must have weights in float32, float16 or bfloat16, got quantized ones in {name}")
    try:
        config = _model_class(kind).config_class.from_pretrained(source, **loading_arguments(source))
    except Exception as error:  # transformers raises anything for values of a wrong type
        raise UserError(f"the text encoder {name} cannot be loaded: {in_one_line(error)}") from error
    TextFormat(source, 1, config.hidden_size)._check(f"the text encoder {name}")
    if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
        found = shown(config.num_hidden_layers)
        raise UserError(f"num_hidden_layers of the text encoder {name} must be from 1 to {MOST_LAYERS}, got {found}")
    return config


def _model_class(kind: str) -> Any:
    import transformers  # imported here, as it takes seconds

    return getattr(transformers, ENCODERS[kind])


def _load_tokenizer(name: str, source: str, flag: str) -> Any:
    from transformers import AutoTokenizer

    inside = Path(source) / "tokenizer"
    place = str(inside) if inside.is_dir() else source
    # Without these transformers makes a tokenizer that knows no words.
    if not any(_has_file(place, file_name) for file_name in VOCABULARIES):
        raise UserError(f"{flag} must come with a tokenizer ({', '.join(VOCABULARIES)}), got none in {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **loading_arguments(source))
    except Exception as error:  # transformers', tokenizers' or the hub's own errors
        raise UserError(f"{flag} must come with a tokenizer that can be loaded, got {name}: {reason(error)}") from error
    if tokenizer.pad_token is None:
        raise UserError(f"{flag} must have a tokenizer with a pad_token, got none in {name}")
    return tokenizer


def _has_file(source: str, file_name: str) -> bool:
    if Path(source).is_dir():
        return (Path(source) / file_name).is_file()
    return cached_file_if_any(source, file_name, **loading_arguments(source)) is not None


def _load_model(name: str, source: str, flag: str) -> nn.Module:
    config = _load_config(name, source, flag)
    source = _model_source(source)
    model_class = _model_class(config.model_type)
    if Path(source).is_dir():
        require_weights(Path(source), f"the text encoder {name}", lambda: model_class(config))
    try:
        with without_load_report():  # it also lists weights that are not used, such as an image side's
            model, info = model_class.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                **loading_arguments(source),
            )
    except Exception as error:  # transformers', safetensors' or the hub's own errors
        raise UserError(f"the text encoder {name} cannot be loaded: {reason(error)}") from error
    if info["missing_keys"]:  # transformers initializes them at random
        raise UserError(f"the text encoder {name} cannot be loaded: its weights lack {min(info['missing_keys'])}")
    return model
