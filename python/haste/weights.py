"""Files of tensors, of every kind that weights go about in. Nothing in them is executed."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from haste.errors import UserError, in_one_line
from haste.torchscript import is_torchscript, read_torchscript


def load_weights(path: Path, flag: str) -> Any:
    """What a file holds, on the CPU: what torch.save has written, the tensors of safetensors or of TorchScript.

    flag: what gave the path, for the sentence.
    Raises UserError if it holds none, or anything but tensors and plain values.
    """
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{flag} is {path}, which {what}; it must be a file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        refuse_inflation(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file leads its reader to raise anything
        raise UserError(f"{flag} is {path}, which cannot be read as weights: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What a loader's error says, fit for a sentence, without torch's advice to let the file do as it likes."""
    text = str(error)
    if "weights_only" not in text and "Weights only" not in text:
        return in_one_line(error)
    _, found, detail = text.rpartition("WeightsUnpickler error: ")
    detail = detail.split("Please")[0].split("Check the documentation")[0]
    return "it holds more than tensors and plain values" + (f": {in_one_line(ValueError(detail))}" if found else "")


def refuse_inflation(path: Path) -> None:
    """ValueError for a file that would fill more memory than it takes on the disk; torch.save packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"its {packed[0]} is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries claim to hold more than its size")


def weights_size(folder: Path, what: str) -> int:
    """The bytes of the weights that from_pretrained() would look for in a folder.

    Raises UserError, naming `what`, for a file that would be inflated to any size.
    """
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.is_file()]
    for path in files:
        try:
            refuse_inflation(path)
        except Exception as error:  # a damaged file leads zipfile to raise anything
            raise UserError(f"{what} cannot be loaded: {path.name}: {in_one_line(error)}") from error
    return sum(path.stat().st_size for path in files)
