"""Sample from a run or a checkpoint, uncached and with the recommended cache, and write both rows as one PNG.

Usage:
    python examples/sample.py exps/haste --num-steps 50
"""

import argparse
import time

import haste
import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ckpt", help="the folder of a run, or a checkpoint of haste, HASTE, REPA or SiT")
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--output", default="samples.png")
    args = parser.parse_args()

    try:
        checkpoint = haste.load_checkpoint(args.ckpt)
    except ValueError as error:  # no such path, or no checkpoint: one sentence that says so
        raise SystemExit(f"sample.py: {error}") from None
    rows = []
    for name, settings in {"uncached": {}, "cached": {"fast": True}}.items():
        begin = time.perf_counter()
        images = haste.sample(checkpoint, labels=range(10), num_steps=args.num_steps, **settings)  # (10, H, W, 3) uint8
        print(f"{name}: {time.perf_counter() - begin:.2f} s")
        rows.append(np.concatenate(list(images), axis=1))
    error = np.abs(rows[0].astype(float) - rows[1]).mean()
    Image.fromarray(np.concatenate(rows)).save(args.output)
    print(f"{args.output}: the rows differ by {error:.2f} grey levels in the mean")


if __name__ == "__main__":
    main()
