"""What plug-ins bring, by name. A plug-in's module is imported when one of its names is asked for.

    DATASETS            "module:function", without arguments or with the folder where it may keep what it trains: images
                        (N, C, S, S) float32 in [-1, 1] with labels (N,) int64, or `CaptionedImages` of
                        `haste.data.captions`
    TEACHERS            "module:object" with prepare(folder), which returns the encoder's folder, and shape(), the
                        values of `haste.teachers.families.Shape`
    EXTRACTORS          "module:function", (folder) -> Extractor of `haste.metrics.features`
    REFERENCES          the data set whose images are the reference of an extractor, where it is not that of its name
    FEATURE_DIMENSIONS  the number of features of an extractor, known before it is loaded
    IMAGE_SIZES         pixels per side of a data set's images, by which samples without a record are recognized
    PRESETS             settings of `haste train`

A data set and an extractor of one name belong together: samples of a run on that data are evaluated with that extractor
against that data, unless --features says otherwise. One of captions reads what prompts asked for: it has `prompts` to
sample, `read(images, prompts)`, which returns rates by name, and `rates`, with a title for each name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

DATASETS = {"digits": "haste.digits:load_digits", "digits-captions": "haste.digits.encoder:load_captioned"}
TEACHERS = {"digits-vit": "haste.digits:Teacher"}
EXTRACTORS = {"digits": "haste.digits:load_extractor", "digits-captions": "haste.digits.reader:load_reader"}
REFERENCES = {"digits-captions": "digits"}
IMAGE_SIZES = {"digits": 8}
FEATURE_DIMENSIONS = {"digits": 64, "digits-captions": 64}

ENCODERS = "encoders"  # the folder, beside those of runs, where data sets keep the text encoders that they train

# A model and a teacher that two processor cores train in minutes.
_DIGITS = {
    "exp_name": "digits",
    "data_dir": "digits",
    "resolution": 8,
    "model": "SiT-Digits/2",
    "enc_type": "digits-vit",
    "layer_map": "2:2,3:3",  # the teacher's last two layers, which teach most: docs/when_alignment_helps.md
    "encoder_depth": 4,
    "projector_dim": 256,
    "attn_coeff": 0.5,
    "early_stop_point": 500,
    "batch_size": 64,
    "max_train_steps": 1000,
    "learning_rate": 4e-3,
    "ema_decay": 0.99,
    "mixed_precision": "no",
    "logging_steps": 10,
    "checkpointing_steps": 200,
    "sampling_steps": 200,
}
_ALL_LAYERS = "0:0,1:1,2:2,3:3"  # of the teacher; nobody has tried others for xAR and text to image
PRESETS: dict[str, dict[str, Any]] = {
    "digits": _DIGITS,
    # By its own objective, DDPM's noise.
    "dit-digits": {**_DIGITS, "exp_name": "dit-digits", "model": "DiT-Digits/2"},
    # 4 cells of 2 x 2 tokens.
    "xar-digits": {
        **_DIGITS,
        "exp_name": "xar-digits",
        "model": "xAR-Digits",
        "layer_map": _ALL_LAYERS,
        "dropout": 0.0,
        "weighting": "lognormal",
    },
    # Text to image: captions, and a CLIP of them that is trained first.
    "t2i-digits": {
        **_DIGITS,
        "exp_name": "t2i-digits",
        "layer_map": _ALL_LAYERS,
        "data_dir": "digits-captions",
        "model": "MM-DiT-Digits",
        "early_stop_point": 300,
        "max_train_steps": 600,
        "decay_steps": 0.4,
        "checkpointing_steps": 120,
        "sampling_steps": 120,
    },
}


def plugin(table: dict[str, str], name: str) -> Any:
    """Import the part that a table lists under a name."""
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
