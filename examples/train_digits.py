"""Train a small SiT on real handwritten digits from Python; the same again resumes.

Usage:
    python examples/train_digits.py --method haste          # three minutes on two cores
    python examples/train_digits.py --method vanilla --steps 100
"""

import argparse
import logging

import haste

METHODS = {
    "haste": {},  # the preset's: attention maps and features, until step 500
    "repa": {"attn_coeff": 0.0, "early_stop_point": -1},
    "vanilla": {"attn_coeff": 0.0, "proj_coeff": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, default="haste")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = haste.TrainConfig.from_preset(
        "digits",
        exp_name=args.method,
        max_train_steps=args.steps,
        batch_size=args.batch_size,
        sampling_steps=0,  # no samples while training
        **METHODS[args.method],
    )
    result = haste.train(config)
    print(f"step {result.step}; checkpoints and log are in {result.folder}")


if __name__ == "__main__":  # data is read by processes that import this file again
    main()
