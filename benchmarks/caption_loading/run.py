"""How many samples per second haste train loads of images with captions, from REPA's layout and from shards.

    python benchmarks/caption_loading/run.py [--images 512] [--workers 2] [--seconds 20] [--output FILE.json]

The data have MS-COCO's sizes: images of 256 x 256 pixels (photographs of scikit-learn, cut anew), five captions each,
features of 77 x 768 and moments of 8 x 32 x 32. Both layouts are written to a temporary folder and loaded by
`haste.data.batches`, with their images, in turns; before each turn the files leave the page cache, where the system
does so on request.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from haste.data import BatchOrder, batches, load_dataset
from haste.data.prepare import encode_npy, encode_png
from haste.data.shards import CAPTIONS_PER_SHARD, IMAGES_PER_SHARD, shard_path, write_shard
from haste.text import CLIP_L
from haste.vae import SD_LATENTS
from sklearn.datasets import load_sample_images

SIDE, CAPTIONS, BATCH, ROUNDS = 256, 5, 32, 3


def photographs(count: int) -> np.ndarray:
    """(count, 3, 256, 256) uint8."""
    sources = load_sample_images().images
    corners = [(sources[n % 2], 7 * n % 171, 11 * n % 384) for n in range(count)]
    images = [image[top : top + SIDE, left : left + SIDE] for image, top, left in corners]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def write_layouts(root: Path, count: int) -> None:
    """The same data in both layouts, root/repa and root/shards."""
    generator = np.random.default_rng(0)
    null = generator.normal(size=CLIP_L.shape).astype(np.float32)
    for name in ("repa", "shards"):
        (root / name).mkdir()
        np.save(root / name / "empty_context.npy", null)
    held = {"images": count, "captions": CAPTIONS * count}
    sizes = {"images": IMAGES_PER_SHARD, "captions": CAPTIONS_PER_SHARD}
    record = {"layout": "shards", "latents": asdict(SD_LATENTS), "text": asdict(CLIP_L), "finished": True}
    (root / "shards" / "prepare.json").write_text(json.dumps({**record, **held, "per_shard": sizes}))
    features = [generator.normal(size=CLIP_L.shape).astype(np.float32) for _ in range(CAPTIONS * count)]
    moments = generator.normal(size=(count, 8, 32, 32)).astype(np.float32)
    images = photographs(count)
    for n in range(count):
        (root / "repa" / f"{n}.png").write_bytes(encode_png(images[n]))
        (root / "repa" / f"{n}.npy").write_bytes(encode_npy(moments[n]))
        for i in range(CAPTIONS):
            (root / "repa" / f"{n}_{i}.npy").write_bytes(encode_npy(features[n * CAPTIONS + i]))
    for kind, size in sizes.items():
        for number, start in enumerate(range(0, held[kind], size)):
            part = slice(start, min(start + size, held[kind]))
            length = part.stop - part.start
            if kind == "captions":
                texts = {"text": np.zeros(length, np.uint8), "ends": np.arange(1, length + 1)}
                arrays = {"features": np.stack(features[part]).astype(np.float16), **texts}
            else:
                rows = np.arange(part.start * CAPTIONS, part.stop * CAPTIONS)
                arrays = {"number": np.arange(part.start, part.stop), "pixels": images[part]}
                arrays |= {"moments": moments[part], "captions": rows, "ends": np.arange(1, length + 1) * CAPTIONS}
            write_shard(shard_path(root / "shards", kind, number), arrays)


def leave_page_cache(folder: Path) -> None:
    """Ask the system to forget the files of a folder."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, workers: int, seconds: float) -> float:
    """Samples per second, without the start of the workers."""
    leave_page_cache(folder)
    data = load_dataset(str(folder), SIDE)
    stream = batches(data, BatchOrder(len(data), BATCH, seed=0), num_workers=workers)
    next(stream)
    began = time.perf_counter()
    for count in itertools.count(1):
        next(stream)
        elapsed = time.perf_counter() - began
        if elapsed > seconds:
            stream.close()
            return count * BATCH / elapsed
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of three turns of each layout")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_layouts(root, args.images)
        bytes_of = {name: sum(path.stat().st_size for path in (root / name).iterdir()) for name in ("repa", "shards")}
        turns = [(name, measure(root / name, args.workers, args.seconds)) for _ in range(ROUNDS) for name in bytes_of]
    rows = {
        name: {
            "samples_per_s": float(np.median([speed for layout, speed in turns if layout == name])),
            "turns": [speed for layout, speed in turns if layout == name],
            "bytes_per_image": size / args.images,
        }
        for name, size in bytes_of.items()
    }
    for name, row in rows.items():
        print(f"{name:6} {row['samples_per_s']:7.0f} samples/s, {row['bytes_per_image'] / 1e6:.2f} MB an image")
    if args.output is not None:
        settings = {"images": args.images, "workers": args.workers, "batch": BATCH, "processor": platform.processor()}
        args.output.write_text(json.dumps({"settings": settings, "layouts": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
