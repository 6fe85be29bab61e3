"""A small CLIP of the digits and their captions, trained by the recipe in seconds and kept in a folder as any other.

CLIP (arXiv 2103.00020): of a batch of images and a caption of each, cross-entropy both ways between the similarities of
their embeddings, with a temperature that is learnt.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from haste.data.captions import CaptionedImages
from haste.data.loader import BatchOrder
from haste.digits import SIDE, digest, one_thread, save_model, shift_randomly
from haste.digits.captions import captioned_digits
from haste.distributed import progress_bar
from haste.registry import ENCODERS

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

UNKNOWN, START, END = "<unknown>", "<start>", "<end>"  # END fills up, too, as in CLIP
TOKENS = 12  # of a caption, with both ends


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of both halves, and their training. The texts' tokens are what a model is given."""

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    patch_size: int = 4
    embedding: int = 32
    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of the steps over which the learning rate rises; it falls to 0 over the rest
    max_grad_norm: float = 1.0
    seed: int = 0


def load_captioned(folder: Path | None = None) -> CaptionedImages:
    """All digits that are not held out, with their captions and the encoder, which is kept in `folder`."""
    data = captioned_digits()
    return CaptionedImages(data.images, data.captions, str(prepare_encoder(folder or Path(ENCODERS))))


def prepare_encoder(folder: Path, settings: EncoderConfig | None = None) -> Path:
    """Return the encoder's folder inside `folder`; train the encoder first if it is missing."""
    settings = settings or EncoderConfig()
    target = folder / f"digits-clip-{digest(settings, 8)}"
    if not (target / "config.json").is_file():
        logger.info("training a CLIP of the digits and their captions for %d steps", settings.steps)
        save_encoder(*train_encoder(settings), target)
    return target


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, without punctuation; every caption begins with START and is filled up with END."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    sentences = {caption for part in (False, True) for own in captioned_digits(part).captions for caption in own}
    words = sorted({word for sentence in sentences for word in re.findall(r"\w+", sentence)})
    # END must not be 2, by which transformers knows OpenAI's first configs, and takes the highest token for the end.
    vocabulary = {word: number for number, word in enumerate([START, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("removed"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(name, vocabulary[name]) for name in (START, END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=END,
    )


def build_clip(settings: EncoderConfig, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP with random weights, of images (B, 3, 8, 8)."""
    from transformers import CLIPConfig, CLIPModel

    shape = {name: getattr(settings, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    shape |= {"intermediate_size": 4 * settings.hidden_size, "projection_dim": settings.embedding}
    text = {
        **shape,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shape, "image_size": SIDE, "patch_size": settings.patch_size, "num_channels": 3}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.embedding))


def train_encoder(settings: EncoderConfig) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Train on all digits that are not held out. Leaves the global random state as it was."""
    data, tokenizer = captioned_digits(), make_tokenizer()
    tokens = tokenized(tokenizer, [caption for captions in data.captions for caption in captions])
    counts = torch.tensor([len(captions) for captions in data.captions])
    first = counts.cumsum(0) - counts
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(settings.seed)
        model = build_clip(settings, tokenizer)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=settings.warmup
        )
        order = BatchOrder(len(data.images), settings.batch_size, settings.seed)
        bar = progress_bar(range(settings.steps), desc="encoder", unit="step")
        for step in bar:
            batch = order.batch(step)
            chosen = first[batch] + (torch.rand(len(batch)) * counts[batch]).long()
            loss = contrastive_loss(model, shift_randomly(data.images[batch]), tokens[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == settings.steps - 1:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval(), tokenizer


def tokenized(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Tokens (N, TOKENS) int64 of captions, filled up."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def contrastive_loss(model: CLIPModel, images: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of images (B, 1, 8, 8) against the captions (B, TOKENS) of the batch, and the other way."""
    logits = model(input_ids=tokens, pixel_values=images.expand(-1, 3, -1, -1)).logits_per_image
    own = torch.arange(len(images))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def save_encoder(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write the encoder's folder, with its tokenizer and how its images are prepared."""
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    save_model(target, [model, tokenizer], images)
