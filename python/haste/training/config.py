"""Every setting of a training run, under the names of HASTE's and REPA's train.py."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from haste import registry
from haste.errors import UserError, shorten
from haste.validation import check_numbers

SECTIONS = {
    "run": "preset", "data": "data_dir", "model": "model", "alignment": "enc_type", "diffusion": "path_type",
    "optimizer": "batch_size", "logging": "logging_steps",
}  # fmt: skip
"""The components by which a file of --config is nested, each with the first of its settings in `TrainConfig`."""

SIZES = ("depth", "hidden_size", "num_heads", "patch_size")
"""The settings that override those of --model."""


@dataclass
class TrainConfig:
    """The settings of `haste train`. The defaults are those of REPA's train.py; the presets have HASTE's."""

    preset: str = ""
    """A set of values for everything below, which any flag overrides. `haste train --preset` lists them all."""
    config: str = ""
    """A YAML file of settings, nested by component, as config.yaml in a run's folder. It overrides the preset; what
    the run in the folder has recorded overrides the file, and a typed flag overrides all of them."""
    output_dir: str = "exps"
    """Folder of all runs."""
    exp_name: str = ""
    """Name of this run: its folder inside --output-dir. The same command again resumes where it stopped, with the
    recorded settings for what it leaves out."""
    init_from: str = ""
    """A checkpoint (of haste, HASTE, REPA or SiT) whose weights and EMA weights a new run begins with. SiT's own,
    whose time and velocity have the other sign, are converted."""
    convention: Literal["repa", "sit"] | None = None
    """Whose the file of --init-from is, where it does not tell: repa (also HASTE's) or sit (SiT's own trainer)."""
    seed: int = 0
    """Same seed, same run."""

    data_dir: str = ""
    """The training images: REPA's layout, as `haste prepare` writes it; a folder or zip with a folder for each class;
    or a Hugging Face data set on disk. `digits` are scikit-learn's handwritten digits, which need no download."""
    vae: str | None = None
    """mse, ema, a hub name or a folder: what turns images without latents into latents while training. None: pixels,
    or the latents that are there."""
    vae_stats: str | None = None
    """A file with mean and standard deviation of each latent channel, in place of the VAE's own scale."""
    on_bad_file: Literal["refuse", "skip"] = "refuse"
    """When a file is missing or damaged: refuse it, or name and count it and take another image."""
    resolution: int = 256
    """Pixels per side of the images."""
    num_classes: int | None = None
    """Classes of the model. None: as many as the images have."""
    num_workers: int = 4
    """Processes that read images, for each training process. Images that fit into memory need none."""

    model: str = "SiT-XL/2"
    """Family, size and patch of the model, such as SiT-B/2."""
    depth: int | None = None
    """Number of blocks, in place of --model's."""
    hidden_size: int | None = None
    """Width of the tokens, in place of --model's."""
    num_heads: int | None = None
    """Heads of attention, in place of --model's."""
    patch_size: int | None = None
    """Pixels or latents along a side of a token, in place of --model's."""
    qk_norm: bool = False
    """Normalise queries and keys in the model's attention."""
    fused_attn: bool = True
    """Fused attention in the model; --no-fused-attn computes it step by step."""
    attention: Literal["sdpa", "flash-attn", "xformers"] = "sdpa"
    """Whose fused attention: torch's, or that of a package that must be installed."""
    compile: bool = False
    """Let torch.compile fuse the model's blocks. The first steps take a minute or so longer."""
    cfg_prob: float = 0.1
    """How often the label is dropped in training, so that samples can be guided later; with 0 the model has no null
    label. REPA's and HASTE's trainers drop 0.1 whatever this says, and their runs that are resumed here still do."""

    legacy: bool = False
    """As in REPA's first runs, drop labels twice, each time as often as --cfg-prob says. (REPA's older names of weights
    need no flag.)"""

    # L = velocity + proj_coeff * features + attn_coeff * attention
    enc_type: str = "dinov2-vit-b"
    """The teacher: dinov2-vit-b and the like, a hub name, or a folder written by save_pretrained(); None for the
    vanilla model. With several, separated by commas, features are aligned with all and attention with the first one."""
    attn_coeff: float = 0.0
    """Weight of the attention loss of HASTE, 0.5 there. 0 turns it off: REPA."""
    proj_coeff: float = 0.5
    """Weight of the feature loss of REPA. 0 turns it off. With both weights 0 no teacher is loaded: the vanilla
    model."""
    layer_map: str = ""
    """Pairs student:teacher of aligned layers, counted from 0, such as 4:8,5:9. Empty: the paper's for this model."""
    encoder_depth: int | None = None
    """Number of blocks, counted from 1, after which the model's features are compared with the teacher's. None: 8, or
    HASTE's for this model where attention is aligned, which is 5 for SiT-B and SiT-S."""
    projector_dim: int = 2048
    """Width of the projector between the model's and the teacher's features."""
    early_stop_point: int = -1
    """The step from which on nothing is aligned and the teacher is freed: HASTE's tau. -1: never."""
    termination: Literal["fixed", "cosine-ramp", "gradient-cosine", "plateau"] = "fixed"
    """How alignment ends: all at once at --early-stop-point; by weights that fall along half a cosine until there;
    when the gradients of alignment and velocity point apart; when the alignment loss no longer falls. With the last two
    --early-stop-point is the latest step at which it ends."""
    ramp_start: int = 0
    """cosine-ramp: the step at which the weights begin to fall."""
    probe_start: int = 50_000
    """gradient-cosine and plateau: the step of the first probe."""
    probe_every: int = 10_000
    """gradient-cosine and plateau: steps between two probes."""
    probe_images: int = 2048
    """gradient-cosine and plateau: images that a probe looks at, always the same ones."""
    probe_block: int = 0
    """gradient-cosine: the block whose gradients are compared, counted from 1. 0: the one at --encoder-depth, or the
    last aligned one of --layer-map without features."""
    probe_threshold: float = -0.05
    """gradient-cosine: alignment ends when the mean cosine is below this."""
    plateau_patience: int = 3
    """plateau: alignment ends after n probes without a lower alignment loss."""
    plateau_min_delta: float = 0.001
    """plateau: a loss is lower when it is below the lowest so far by more than this."""
    teacher_resolution: int | None = None
    """Pixels per side that the teacher sees. None: as many as give it the model's grid of tokens."""
    teacher_grid: Literal["match", "interpolate"] = "match"
    """Where the teacher's own grid of tokens is not the model's: resize the images until it is (match), or let the
    teacher see images of its own size, or of --teacher-resolution, and interpolate its queries, keys and features."""

    path_type: Literal["linear", "cosine"] = "linear"
    """How data turns into noise."""
    prediction: Literal["v"] = "v"
    """What the model predicts: the velocity."""
    weighting: Literal["uniform", "lognormal"] = "uniform"
    """How often each noise level is seen."""

    batch_size: int = 256
    """Images per forward pass, over all devices."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of --batch-size images per step."""
    max_train_steps: int = 400_000
    """Steps in all."""
    epochs: int = 1400
    """Training ends after so many epochs, if that is before --max-train-steps."""
    learning_rate: float = 1e-4
    """AdamW's learning rate, constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its value."""
    adam_beta1: float = 0.9
    """AdamW: memory of the gradient's mean."""
    adam_beta2: float = 0.999
    """AdamW: memory of the gradient's square."""
    adam_weight_decay: float = 0.0
    """AdamW: decay of the weights."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the root of the squares."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights, with which images are sampled."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "fp16"
    """Type of the matrix products."""
    allow_tf32: bool = False
    """Let NVIDIA GPUs round fp32 matrix products to TF32."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite: stop, and say at which step; or leave that step out and say so. Neither
    lets it reach the weights. Under fp16 an infinite gradient is left out either way."""

    logging_steps: int = 100
    """Steps between two lines of log.jsonl."""
    checkpointing_steps: int = 50_000
    """Steps between two checkpoints. The last step, Ctrl-C and SIGTERM write one as well."""
    sampling_steps: int = 10_000
    """Steps between two grids of samples of the EMA model, in samples/ of the run. The last step has one as well. 0:
    none."""
    checkpoints_total_limit: int = 0
    """Keep the newest n checkpoints and delete older ones, once a newer one is whole on the disk. Damaged ones
    are neither counted nor deleted. 0: keep all."""
    resume_step: int = 0
    """Resume from the checkpoint of this step, as a branch: what later steps had left moves to branches/ of the run.
    The same value again resumes that branch. 0: from the newest whole checkpoint, if there is any."""
    report_to: str = "none"
    """Where log and samples go besides the run's folder: tensorboard, wandb, both with a comma between them, or none.
    wandb's project is haste, or what the environment's WANDB_PROJECT names."""
    logging_dir: str = "logs"
    """Folder inside --output-dir for what tensorboard reads."""

    @property
    def teachers(self) -> list[str]:
        """The teachers to load; none when nothing is aligned."""
        if self.enc_type == "None" or (self.proj_coeff == 0 and self.attn_coeff == 0):
            return []
        return [name.strip() for name in self.enc_type.split(",")]

    @property
    def aligns_features(self) -> bool:
        """Whether there is a loss L_R."""
        return bool(self.teachers) and self.proj_coeff != 0

    @property
    def aligns_attention(self) -> bool:
        """Whether there is a loss L_A."""
        return bool(self.teachers) and self.attn_coeff != 0

    @property
    def label_dropout(self) -> float:
        """The share of labels that are dropped, once or, as --legacy asks, twice."""
        return 1 - (1 - self.cfg_prob) ** 2 if self.legacy else self.cfg_prob

    @property
    def trackers(self) -> list[str]:
        """Those that --report-to names."""
        return [] if self.report_to in ("", "none") else [name.strip() for name in self.report_to.split(",")]

    def check(self) -> None:
        """UserError, naming the flag, its value and what it must be, for values that no run can have."""
        if not self.exp_name:
            raise UserError("--exp-name must be the name of the run, or a --preset be given that has one, got nothing")
        check_folder_name("exp_name", self.exp_name)
        check_folder_name("logging_dir", self.logging_dir)
        check_numbers(self)
        if set(self.trackers) - set(TRACKERS):
            known = "tensorboard, wandb, both with a comma between them, or none"
            raise UserError(f"--report-to must be {known}, got {shorten(self.report_to)}")

    def check_model(self) -> None:
        """UserError if model, layer map and rule of termination do not fit together. Brings torch."""
        from haste.alignment.aligner import choose_layer_map
        from haste.alignment.termination import make_termination
        from haste.models import model_depth
        from haste.models.layers import check_backend

        depth, chosen = model_depth(self), resolve(self)
        check_backend(self.attention)
        if self.aligns_features and not 1 <= chosen.encoder_depth <= depth:
            raise UserError(f"--encoder-depth must be 1 to {depth}, the depth of the model, got {chosen.encoder_depth}")
        if self.aligns_attention:
            choose_layer_map(chosen.layer_map, self.model).check_student(depth)
        make_termination(chosen)

    def to_namespace(self) -> argparse.Namespace:
        """As the public trainers keep it in their checkpoints."""
        return argparse.Namespace(**asdict(self))


def resolve(config: TrainConfig, num_classes: int | None = None) -> TrainConfig:
    """The same run, with values in place of what a setting leaves open. A run records itself so.

    Args:
        num_classes: of the data, if they are known.

    Raises:
        UserError: a model or a layer map that does not exist.
    """
    from haste.alignment.aligner import choose_encoder_depth, choose_layer_map
    from haste.models import find_size, model_depth

    encoder_depth, layer_map = config.encoder_depth, config.layer_map
    if encoder_depth is None:
        encoder_depth = choose_encoder_depth(config.model, model_depth(config), config.aligns_attention)
    if config.aligns_attention:
        layer_map = str(choose_layer_map(layer_map, config.model))
    _, size = find_size(config.model)
    return replace(
        config,
        num_classes=num_classes if config.num_classes is None else config.num_classes,
        encoder_depth=encoder_depth,
        layer_map=layer_map,
        **{name: None for name in SIZES if getattr(config, name) == size.get(name)},  # as --model has it
    )


TRACKERS = ("tensorboard", "wandb")
LONGEST_NAME = 200  # bytes; file systems allow 255, and names are put together from this one


def check_folder_name(name: str, value: str) -> None:
    """UserError, naming the flag, if a value is not the plain name of one folder."""
    fits = 0 < len(value.encode(errors="replace")) <= LONGEST_NAME and value not in (".", "..")
    if not fits or value != value.strip() or "/" in value or not value.isprintable():
        raise UserError(
            f"--{name.replace('_', '-')} must be a plain name of a folder, without / and at most {LONGEST_NAME} bytes "
            f"long, got {value[:60]!r}"
        )


def sections() -> dict[str, list[str]]:
    """The settings of each component, in their order."""
    found: dict[str, list[str]] = {}
    names = [field.name for field in fields(TrainConfig)]
    begins = {first: section for section, first in SECTIONS.items()}
    section = ""
    for name in names:
        section = begins.get(name, section)
        found.setdefault(section, []).append(name)
    return found


# ---- presets: named sets of settings, whose values every typed flag overrides ----

# HASTE (arXiv 2505.16792): layer pairs and feature depth per size, for DINOv2-B. S is not in the paper; it has the
# depth of B and takes its values.
DEEP = {"layer_map": "4:8,5:9,6:10,7:11", "encoder_depth": 8}
SHALLOW = {"layer_map": "2:7,3:9,4:11", "encoder_depth": 5}
HASTE_LAYERS = {"S": SHALLOW, "B": SHALLOW, "L": DEEP, "XL": DEEP}

# τ. At 512 pixels the paper gives XL's alone; the others keep what they have at 256.
HASTE_END = {
    256: {"S": 100_000, "B": 100_000, "L": 250_000, "XL": 250_000},
    512: {"S": 100_000, "B": 100_000, "L": 250_000, "XL": 300_000},
}

# REPA (arXiv 2410.06940): features alone, to the end. S, again, as B.
REPA_DEPTH = {"S": 4, "B": 4, "L": 8, "XL": 8}


def _published_presets() -> dict[str, dict[str, Any]]:
    """haste-xl-256, repa-xl-256, baseline-xl-256 and so on, for every size at 256 and 512 pixels."""
    presets = {}
    for resolution, ends in HASTE_END.items():
        for size, end in ends.items():
            shared = {"resolution": resolution, "model": f"SiT-{size}/2"}
            methods: dict[str, dict[str, Any]] = {
                "haste": {"attn_coeff": 0.5, **HASTE_LAYERS[size], "early_stop_point": end},
                "repa": {"attn_coeff": 0.0, "encoder_depth": REPA_DEPTH[size], "early_stop_point": -1},
                "baseline": {"attn_coeff": 0.0, "proj_coeff": 0.0, "early_stop_point": -1},
            }
            for method, settings in methods.items():
                name = f"{method}-{size.lower()}-{resolution}"
                presets[name] = {"exp_name": name, **shared, **settings}
    return presets


PRESETS: dict[str, dict[str, Any]] = {
    **registry.PRESETS,
    **_published_presets(),
}


def preset_config(name: str) -> TrainConfig:
    """The settings of a preset, or the trainer's own for an empty name; UserError for a name that is not known."""
    if not name:
        return TrainConfig()
    if name not in PRESETS:
        raise UserError(
            f"--preset must be digits, haste-xl-256 or another that `haste train --preset` lists, got {shorten(name)}"
        )
    return replace(TrainConfig(), preset=name, **PRESETS[name])


def describe_preset(name: str) -> str:
    """What a preset sets, as one would type it."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in PRESETS[name].items())


def describe_run(config: TrainConfig) -> str:
    """What a preset sets, with the run's values; behind an overridden one the preset's own."""
    parts = []
    for key, own in PRESETS[config.preset].items():
        value = getattr(config, key)
        parts.append(f"--{key.replace('_', '-')} {value}" + ("" if value == own else f" (preset: {own})"))
    return " ".join(parts)


def list_presets() -> str:
    """Every preset with what it sets, one per paragraph."""
    return "\n\n".join(f"{name}\n  {describe_preset(name)}" for name in PRESETS)
