"""Text encoders on disk, small enough for tests, and captions."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *["a", "the", "red", "green", "dark", "bright", "square", "round", "photograph", "of", "temple", "flower", "no"],
]
CAPTIONS = [
    f"a {colour} photograph of a {thing}" for colour in ("red", "green", "dark") for thing in ("temple", "flower")
]
TOKENS, WIDTH = 10, 12  # of the encoders here
SIZES = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tokenizer(folder: Path, longest: int = TOKENS, pad: str = "</s>") -> None:
    """A tokenizer of whole words that AutoTokenizer loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", WORDS.index("<s>")), ("</s>", WORDS.index("</s>"))]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=longest, **names)
    tokenizer.save_pretrained(folder)


def save_text_encoder(folder: Path, kind: str = "clip", width: int = WIDTH, longest: int = TOKENS) -> Path:
    """A random encoder: "clip" is a whole CLIPModel, "clip_text_model" its text side, "t5" an encoder of T5."""
    import transformers as tf

    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": len(WORDS), "hidden_size": width, "max_position_embeddings": longest}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "projection_dim": 8}
    if kind == "clip":
        vision = {**SIZES, "hidden_size": 12, "image_size": 8, "patch_size": 4, "projection_dim": 8}
        model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    elif kind == "clip_text_model":
        model = tf.CLIPTextModel(tf.CLIPTextConfig(**text))
    else:
        sizes = {"d_model": width, "d_ff": 16, "d_kv": 4, "num_layers": 2, "num_heads": 2}
        model = tf.T5EncoderModel(tf.T5Config(vocab_size=len(WORDS), **sizes))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, longest)
    return folder
