from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from image_files import photographs, save_vae, write_classes


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """12 images of 20 x 16 pixels in 3 classes."""
    return write_classes(tmp_path / "photos")


@pytest.fixture
def repa_folder(tmp_path: Path) -> Path:
    """6 images of 16 x 16 pixels with moments of 4 channels and 2 x 2 latents, as REPA's preprocessing has them."""
    root = tmp_path / "repa"
    (root / "images" / "00000").mkdir(parents=True)
    (root / "vae-sd" / "00000").mkdir(parents=True)
    labels = []
    for index, image in enumerate(photographs(6, (16, 16))):
        image.save(root / "images" / "00000" / f"img{index:08d}.png")
        name = f"00000/img-mean-std-{index:08d}.npy"
        moments = np.full((8, 2, 2), index, dtype=np.float32)
        moments[4:] = 0.5
        np.save(root / "vae-sd" / name, moments)
        labels.append([name, index % 4])
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root
