"""What plug-ins bring, by name: each is imported when one of its names is asked for, and by nobody else.

The parts of a plug-in, as "module" or "module:attribute":

    DATASETS    a function without arguments: images (N, C, S, S) float32 in [-1, 1], labels (N,) int64
    TEACHERS    a module with prepare(folder), which returns the folder of the encoder, and shape(), the values of
                `haste.teachers.families.Shape`
    EXTRACTORS  a function (folder) -> Extractor, as `haste.evaluation.features` has it
    IMAGE_SIZES pixels per side of a data set's images, by which samples without a record are known
    PRESETS     a dictionary of settings of `haste train`

A data set and an extractor of one name belong together: samples of such a run are evaluated in these features, against
this data, unless others are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

DATASETS = {"digits": "haste.digits:load_digits"}
TEACHERS = {"digits-vit": "haste.digits.teacher"}
EXTRACTORS = {"digits": "haste.digits.classifier:load_extractor"}
IMAGE_SIZES = {"digits": 8}
PRESETS = {"digits": "haste.digits:PRESET"}


def plugin(table: dict[str, str], name: str) -> Any:
    """Import what a table has under a name."""
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute) if attribute else import_module(module)
