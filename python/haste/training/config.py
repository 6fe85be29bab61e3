"""The settings of a training run, under the names of HASTE's and REPA's train.py."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from haste.errors import UserError, shorten
from haste.metrics.config import choose_features
from haste.registry import EXTRACTORS
from haste.training.presets import PRESETS
from haste.training.schedule import check_schedule
from haste.validation import BOUNDS, check_numbers, check_types

SECTIONS = {
    "run": "preset", "data": "data_dir", "model": "model", "alignment": "enc_type", "diffusion": "path_type",
    "optimizer": "batch_size", "logging": "logging_steps",
}  # fmt: skip
"""The sections of a --config file, each with the first of its settings in `TrainConfig`."""

SIZES = ("depth", "hidden_size", "num_heads", "patch_size", "positions", "norm", "mlp")
"""The settings that override a size of --model."""

TRACKERS = ("tensorboard", "wandb")
LONGEST_NAME = 200  # bytes; file systems allow 255, and longer names are made from this one


@dataclass
class TrainConfig:
    """The settings of `haste train`. The defaults are those of REPA's train.py; HASTE's are presets.

    Raises:
        UserError: a value of another type than its field's.
    """

    preset: str = ""
    """Named set of defaults for the settings below. `haste train --preset` lists all presets."""
    config: str = ""
    """YAML file of settings, such as the config.yaml of a run. It overrides the preset and is overridden by the
    settings recorded in the run's folder and by flags."""
    output_dir: str = "exps"
    """Folder of all runs."""
    exp_name: str = ""
    """Name of the run, and of its folder in --output-dir. An existing run is resumed; settings that are not given keep
    the values that the run recorded."""
    init_from: str = ""
    """Checkpoint of haste, HASTE, REPA, SiT, LightningDiT or DiT, or run folder for its latest checkpoint. A new run
    starts from its weights and EMA weights."""
    convention: Literal["repa", "sit", "dit"] | None = None
    """Who trained the --init-from file, if its content does not show it: repa (REPA and HASTE), sit (SiT's own trainer
    and LightningDiT's, whose weights are converted) or dit (DiT's, of noise)."""
    seed: int = 0
    """Seed of the run."""

    data_dir: str = ""
    """Training images: the layout of REPA, as `haste prepare` writes it; a folder or zip file with one folder per
    class, of images or of MAR's cached latents; a folder of LightningDiT's shards of latents; a Hugging Face data set
    on disk; a tar or a folder of tars of webdataset, with .cls labels; images with captions, as `haste prepare
    --captions` writes them, or REPA's coco256_features; or `digits`, scikit-learn's handwritten digits, and
    `digits-captions`, these with captions."""
    latents_dir: str | None = None
    """Folder of the latents beside images/ in --data-dir, such as vae-in. None: vae-sd, or the one that `haste prepare`
    wrote."""
    image_dir: str | None = None
    """Folder or zip file of the images behind MAR's or LightningDiT's latents. Only a teacher needs them."""
    vae: str | None = None
    """VAE that encodes images during training: mse, ema, a hub name or a folder (AutoencoderKL, DC-AE or RAE), or
    a file such as MAR's kl16.ckpt or VA-VAE's. None: train on pixels, or on the latents in --data-dir."""
    vae_stats: str | None = None
    """File with the mean and standard deviation of each latent channel, used instead of the VAE's scaling factor:
    latents_stats.pt of `haste prepare` or LightningDiT, or REPA-E's."""
    on_bad_file: Literal["refuse", "skip"] = "refuse"
    """What to do with a missing or damaged file: stop with an error (refuse), or log it and use the next image
    (skip)."""
    resolution: int = 256
    """Image size in pixels."""
    num_classes: int | None = None
    """Number of classes of the model. None: that of the data set."""
    random_flip: bool = False
    """Mirror each image with probability 1/2 at each use, as DiT was trained: of pixels, of images that --vae encodes,
    or of stored latents with those of the mirror images (`haste prepare --flip`). A teacher sees the same image."""
    num_workers: int = 4
    """Number of data loading processes per training process. Not used for images that are kept in memory."""

    model: str = "SiT-XL/2"
    """Family and size, of most with the patch size: SiT-B/2, DiT-XL/2, LightningDiT-XL/1, xAR-B or MM-DiT-COCO."""
    depth: int | None = None
    """Number of blocks. Overrides --model."""
    hidden_size: int | None = None
    """Width of the tokens. Overrides --model."""
    num_heads: int | None = None
    """Number of attention heads. Overrides --model."""
    patch_size: int | None = None
    """Patch size in pixels or latents. Overrides --model."""
    positions: Literal["sincos", "rope"] | None = None
    """SiT and DiT: a fixed sine-cosine table (sincos), with rotary positions of queries and keys besides (rope).
    Overrides --model."""
    norm: Literal["layernorm", "rmsnorm"] | None = None
    """SiT and DiT: the norms of the model. Overrides --model."""
    mlp: Literal["gelu", "swiglu"] | None = None
    """SiT and DiT: the MLP of each block; of swiglu the hidden width is 2/3 of that of gelu. Overrides --model."""
    entity: Literal["token", "cell", "subsample", "scale", "image"] | None = None
    """xAR: what is generated at once: a token, a cell of --entity-size x --entity-size tokens, a subsample (tokens at
    distances of --entity-size), a scale of the image, or the whole image. None: cell."""
    entity_size: int | None = None
    """xAR: tokens along a side of a cell, distance of a subsample's tokens, or tokens along a side of the smallest
    scale. None: half of the image's for a cell, else 2."""
    context: Literal["random", "clean", "increasing", "decreasing"] | None = None
    """xAR: what an entity sees of earlier ones during training: noisy ones at random times, at times that increase or
    decrease from one to the next, or clean ones. None: random."""
    dropout: float | None = None
    """xAR: dropout in attention and MLP during training. None: 0.1."""
    qk_norm: bool = False
    """Normalize queries and keys in the attention of the model, by --norm."""
    fused_attn: bool = True
    """Use fused attention in the model."""
    attention: Literal["sdpa", "flash-attn", "xformers"] = "sdpa"
    """Implementation of fused attention. flash-attn and xformers must be installed."""
    compile: bool = False
    """Compile the blocks of the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass, in place of keeping its activations: less memory, more time."""
    cfg_prob: float = 0.1
    """Probability of dropping the label or the caption, for classifier-free guidance. With 0 the model has no null
    label. REPA and HASTE always use 0.1; their runs keep it when they are resumed here."""

    legacy: bool = False
    """Drop labels twice, each time with probability --cfg-prob, as REPA's first runs did."""

    # L = own loss (velocity or noise) + proj_coeff * features + attn_coeff * attention
    enc_type: str | None = "dinov2-vit-b"
    """Teacher: a short name such as dinov2-vit-b, a hub name, or a folder written by save_pretrained(). Several are
    separated by commas; attention is aligned with the first one, features with all. None: no alignment."""
    attn_coeff: float = 0.0
    """Weight of the attention alignment loss. HASTE uses 0.5. 0: off."""
    proj_coeff: float = 0.5
    """Weight of the feature alignment loss. 0: off. With --attn-coeff 0 as well, no teacher is loaded."""
    cls_coeff: float | None = None
    """SiT: weight of the loss of the teacher's class token, which the model then denoises along with the image (REG,
    which has --cls 0.03). 0: the model has no class token. None: 0."""
    layer_map: str = ""
    """Pairs student:teacher of layers whose attention is aligned, counted from 0, such as 4:8,5:9. Empty: the pairs
    published for --model."""
    encoder_depth: int | None = None
    """Block of the model, counted from 1, whose output is aligned with the teacher's features. None: 8, or if attention
    is aligned, the block that HASTE uses for --model."""
    projector_dim: int = 2048
    """Hidden width of the projector from the model's features to the teacher's."""
    projection_layer_type: Literal["mlp", "conv"] = "mlp"
    """The projector: three linear layers, as in REPA (mlp), or one 3 x 3 convolution over the grid of tokens, as in
    iREPA (conv)."""
    spnorm_method: Literal["none", "zscore"] = "none"
    """Spatial normalization of the teacher's features: none, or as in iREPA (x - alpha * mean) / std over the tokens of
    an image, with alpha of --zscore-alpha (zscore)."""
    zscore_alpha: float = 0.6
    """Share of the mean that --spnorm-method zscore takes away. iREPA's code has 0.6."""
    early_stop_point: int = -1
    """Step at which alignment ends and the teacher is freed (tau in HASTE). -1: never."""
    termination: Literal["fixed", "cosine-ramp", "gradient-cosine", "plateau"] = "fixed"
    """When alignment ends. fixed: at --early-stop-point. cosine-ramp: the weights decay to 0 at --early-stop-point.
    gradient-cosine: when the gradients of alignment and of the loss without it oppose each other. plateau: when the
    alignment loss stops falling. The last two end at --early-stop-point at the latest."""
    ramp_start: int = 0
    """cosine-ramp: step at which the weights start to decay."""
    probe_start: int = 50_000
    """gradient-cosine and plateau: step of the first probe."""
    probe_every: int = 10_000
    """gradient-cosine and plateau: number of steps between probes."""
    probe_images: int = 2048
    """gradient-cosine and plateau: number of images per probe. All probes use the same images."""
    probe_block: int = 0
    """gradient-cosine: block whose gradients are compared, counted from 1. 0: --encoder-depth, or without feature
    alignment the last aligned layer of --layer-map."""
    probe_threshold: float = -0.05
    """gradient-cosine: alignment ends when the mean cosine falls below this value."""
    plateau_patience: int = 3
    """plateau: number of probes without a lower alignment loss after which alignment ends."""
    plateau_min_delta: float = 0.001
    """plateau: minimum decrease of the alignment loss."""
    teacher_resolution: int | None = None
    """Image size of the teacher in pixels. None: the size at which the teacher has as many tokens as the model."""
    teacher_grid: Literal["match", "interpolate", "interpolate-student"] = "match"
    """What to do if the teacher has another grid of tokens than the model: resize the images (match), or keep the
    teacher's own image size, or --teacher-resolution, and interpolate its queries, keys and features (interpolate) or
    the model's (interpolate-student)."""

    disp_coeff: float = 0.0
    """Weight of Dispersive Loss, which pushes the images of a batch apart in the hidden space of the model, without a
    teacher and to the end of the run. 0: off."""
    disp_depth: int | None = None
    """Block of the model, counted from 1, whose tokens Dispersive Loss reads. None: the one after a quarter of them."""
    disp_tau: float = 1.0
    """Temperature of Dispersive Loss."""
    sra_coeff: float = 0.0
    """Weight of self-representation alignment (SRA): of what block --encoder-depth makes of a noisy image with what
    block --block-out-t of the run's EMA makes of it with less noise, without a teacher. It ends as alignment does. SRA
    begins with 0.2, for DiT with 0.04. 0: off."""
    block_out_t: int | None = None
    """Block of the EMA, counted from 1, for --sra-coeff. None: the one after 7/10 of them, and --encoder-depth is the
    one after 3/10."""

    path_type: Literal["linear", "cosine"] = "linear"
    """Interpolation path between data and noise."""
    prediction: Literal["v", "noise"] | None = None
    """What the model predicts: v, the velocity, or noise, with a learned variance (improved DDPM). None: noise for DiT,
    v for all others; no model has the choice."""
    weighting: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of the training timesteps of a model of velocity: uniform, or lognormal noise levels, which on the
    linear path are logit-normal timesteps. A DiT's are uniform."""
    time_shift: float = 1.0
    """Factor of the noise level of each training timestep: on the linear path t' = s t / (1 + (s - 1) t), where 1 is
    noise. RAE's is the square root of the dimension of a latent over 4096. Samples of the run use it as well."""

    batch_size: int = 256
    """Total batch size over all devices, per micro-batch."""
    gradient_accumulation_steps: int = 1
    """Number of micro-batches per optimizer step."""
    max_train_steps: int = 400_000
    """Total number of training steps."""
    epochs: int = 1400
    """Maximum number of epochs. Training ends at --max-train-steps or --epochs, whichever comes first."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices of the blocks and AdamW for all other parameters; both have one learning rate and
    weight decay."""
    learning_rate: float = 1e-4
    """Learning rate between warmup and decay."""
    warmup_steps: float = 0.0
    """Number of steps of linear learning rate warmup. Below 1: a share of the run."""
    decay_steps: float = 0.0
    """Number of steps, at the end of the run, in which the learning rate falls to --min-learning-rate. Below 1: a share
    of the run. 0: no decay. A run that is extended follows the schedule of its new length."""
    decay_shape: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls in --decay-steps: along half a cosine, or a line."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of --decay-steps."""
    adam_beta1: float = 0.9
    """beta1 of AdamW."""
    adam_beta2: float = 0.999
    """beta2 of AdamW."""
    adam_weight_decay: float = 0.0
    """Weight decay of AdamW, and of Muon."""
    adam_decay: Literal["all", "matrices"] = "all"
    """Which parameters decay: all, or matrices, which leaves out biases and other parameters of one dimension, as xAR
    does."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm, for gradient clipping."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights."""
    extra_ema_decays: str = ""
    """Decays of further averages that the run keeps, such as 0.999,0.9995. haste sample --ema-decay chooses one."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "fp16"
    """Mixed precision."""
    allow_tf32: bool = False
    """Allow TF32 on NVIDIA GPUs."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient is not finite: stop with an error, or skip the step and log it. The weights are
    not updated either way. With fp16, steps with infinite gradients are always skipped."""

    logging_steps: int = 100
    """Number of steps between lines of log.jsonl."""
    checkpointing_steps: int = 50_000
    """Number of steps between checkpoints. The last step, Ctrl-C and SIGTERM save one as well."""
    sampling_steps: int = 10_000
    """Number of steps between grids of EMA samples, saved in samples/ of the run. The last step saves one as well. 0:
    no samples."""
    evaluation_steps: int = 0
    """Number of steps between evaluations of the EMA model, logged with the losses: FD, with Inception also sFID, on
    digits also the label accuracy. The last step is evaluated as well. 0: no evaluation."""
    evaluation_samples: int = 1000
    """Number of images per evaluation, each time from the same noise and labels, sampled in 50 steps without
    guidance."""
    evaluation_features: str | None = None
    """Feature extractor of the evaluation, as --features of haste evaluate: inception:PATH, pytorch-fid:PATH, or the
    name or folder of a teacher. None: the classifier of the digits, for digits."""
    evaluation_reference: str | None = None
    """Real images of the evaluation, as --reference of haste evaluate: a folder, or an .npz of images or of statistics.
    None: digits, for digits."""
    checkpoints_total_limit: int = 0
    """Maximum number of checkpoints to keep; older ones are deleted. Damaged files are neither counted nor deleted. 0:
    no limit."""
    resume_step: int = 0
    """Step to resume from, as a new branch of the run: checkpoints, samples and log lines of later steps are moved to
    branches/. The same value again resumes the branch. 0: the newest checkpoint."""
    report_to: str = "none"
    """Where to log besides the run's folder: tensorboard, wandb, both separated by a comma, or none. The wandb project
    is haste, or WANDB_PROJECT."""
    logging_dir: str = "logs"
    """Folder in --output-dir for tensorboard logs."""

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> TrainConfig:
        """The settings of a preset, such as digits or haste-xl-256.

        Args:
            name: one of those that `haste train --preset` lists; the defaults if empty.
            settings: what overrides the preset's.

        Raises:
            UserError: an unknown preset, or a value of another type than the setting's.
        """
        if name and name not in PRESETS:
            known = "digits, haste-xl-256 or another that `haste train --preset` lists"
            raise UserError(f"--preset must be {known}, got {shorten(name)}")
        return cls(**{"preset": name, **PRESETS.get(name, {}), **settings})

    @property
    def teachers(self) -> list[str]:
        """The teachers to load; none if nothing is aligned, and no class token denoised."""
        needed = self.proj_coeff != 0 or self.attn_coeff != 0 or self.has_class_token
        if self.enc_type is None or self.enc_type.lower() == "none" or not needed:
            return []
        return [name.strip() for name in self.enc_type.split(",")]

    @property
    def aligns_features(self) -> bool:
        """Whether the loss has the term L_R."""
        return bool(self.teachers) and self.proj_coeff != 0

    @property
    def aligns_attention(self) -> bool:
        """Whether the loss has the term L_A."""
        return bool(self.teachers) and self.attn_coeff != 0

    @property
    def disp_block(self) -> int:
        """The block that Dispersive Loss reads, from 1; 0 if it is off."""
        return (self.disp_depth or 0) if self.disp_coeff else 0

    @property
    def projector_kind(self) -> str:
        """Of `haste.models.layers.build_projector`."""
        return "sra" if self.sra_coeff else self.projection_layer_type

    @property
    def has_class_token(self) -> bool:
        """Whether the model denoises the first teacher's class token, to the end of the run."""
        return bool(self.cls_coeff)

    @property
    def label_dropout(self) -> float:
        """The share of labels that are dropped: --cfg-prob, applied twice with --legacy."""
        return 1 - (1 - self.cfg_prob) ** 2 if self.legacy else self.cfg_prob

    @property
    def ema_parts(self) -> dict[str, float]:
        """The decay of each average of the weights, by the part of a checkpoint that holds it; the first is "ema"."""
        words = self.extra_ema_decays.split(",") if self.extra_ema_decays else []
        try:
            extra = [float(word) for word in words]
        except ValueError:
            extra = [math.nan]  # which is out of all bounds
        for decay in extra:
            if decay not in BOUNDS["ema_decay"] or [self.ema_decay, *extra].count(decay) > 1:
                raise UserError("--extra-ema-decays must be numbers from 0 to below 1 such as 0.999,0.9995, each once "
                                f"and none of them --ema-decay, got {shorten(self.extra_ema_decays)}")  # fmt: skip
        return {"ema": self.ema_decay, **{f"ema_{decay!r}": decay for decay in extra}}

    @property
    def trackers(self) -> list[str]:
        """The trackers of --report-to."""
        return [] if self.report_to in ("", "none") else [name.strip() for name in self.report_to.split(",")]

    @property
    def evaluation_against(self) -> tuple[str, str]:
        """Features and reference of the evaluation, by default the data's own. UserError if one is missing."""
        own = self.data_dir if self.data_dir in EXTRACTORS else None
        return choose_features(self.evaluation_features or own, self.evaluation_reference, "evaluation-")

    def check(self) -> None:
        """Raise UserError, naming the flag, for names and numbers out of bounds."""
        if not self.exp_name:
            raise UserError("--exp-name must be the name of the run, got nothing; a --preset has one, too")
        check_folder_name("exp_name", self.exp_name)
        check_folder_name("logging_dir", self.logging_dir)
        check_numbers(self)
        check_schedule(self)
        _ = self.ema_parts
        self._check_class_token()
        against = {name: getattr(self, f"evaluation_{name}") for name in ("features", "reference")}
        if self.evaluation_steps:
            _ = self.evaluation_against  # UserError if one is missing
        elif given := [f"--evaluation-{name} {value}" for name, value in against.items() if value is not None]:
            raise UserError(f"--evaluation-steps must be above 0 with {' and '.join(given)}, got 0")
        if set(self.trackers) - set(TRACKERS):
            known = "tensorboard, wandb, both separated by a comma, or none"
            raise UserError(f"--report-to must be {known}, got {shorten(self.report_to)}")

    def _check_class_token(self) -> None:
        if not self.has_class_token:
            return
        given = f"with --cls-coeff {self.cls_coeff:g}"
        if not self.teachers:
            raise UserError(f"--enc-type must be a teacher {given}, whose class token it is, got {self.enc_type}")
        if self.projection_layer_type != "mlp":
            raise UserError(f"--projection-layer-type must be mlp {given}, as a class token has no neighbours, got "
                            f"{self.projection_layer_type}")  # fmt: skip

    def check_model(self) -> None:
        """Raise UserError if model, layer map and termination rule do not fit together. Imports torch."""
        from haste.alignment.aligner import choose_layer_map
        from haste.alignment.self_alignment import check_self_alignment
        from haste.alignment.termination import make_termination
        from haste.models import find_size, model_depth
        from haste.models.layers import check_backend

        depth, resolved = model_depth(self), resolve(self)
        prediction = find_size(self.model)[0].prediction
        if resolved.prediction != prediction:
            raise UserError(f"--prediction must be {prediction} for --model {self.model}, got {self.prediction}")
        check_backend(self.attention)
        if resolved.disp_block > depth:
            raise UserError(f"--disp-depth must be 1 to {depth}, the depth of the model, got {resolved.disp_depth}")
        if (self.aligns_features or self.sra_coeff) and not 1 <= (resolved.encoder_depth or 0) <= depth:
            raise UserError(f"--encoder-depth must be 1 to {depth}, the depth of the model, got "
                            f"{resolved.encoder_depth}{self._of_preset('encoder_depth')}")  # fmt: skip
        if self.aligns_attention:
            try:
                choose_layer_map(resolved.layer_map, self.model).check_student(depth)
            except UserError as error:
                raise UserError(f"{error}{self._of_preset('layer_map')}") from error
        if self.sra_coeff:
            check_self_alignment(resolved, depth)
        make_termination(resolved)

    def _of_preset(self, name: str) -> str:
        """What to do about a value that comes from the preset, whose model has another depth."""
        if self.depth is None or PRESETS.get(self.preset, {}).get(name) != getattr(self, name):
            return ""
        return f"; --preset {self.preset} is for another depth: give --encoder-depth and --layer-map with --depth"

    def to_namespace(self) -> argparse.Namespace:
        """The settings as the public trainers keep them in their checkpoints."""
        return argparse.Namespace(**asdict(self))


def resolve(config: TrainConfig, num_classes: int | None = None) -> TrainConfig:
    """Replace open settings by their values. A run records its settings in this form.

    Args:
        num_classes: of the data set, if known.

    Raises:
        UserError: an unknown model, or a layer map that cannot be parsed.
    """
    from haste.alignment.aligner import choose_encoder_depth, choose_layer_map
    from haste.models import find_size, model_depth, own_settings

    encoder_depth, layer_map = config.encoder_depth, config.layer_map
    if encoder_depth is None and config.sra_coeff:
        encoder_depth = max(1, round(0.3 * model_depth(config)))
    if encoder_depth is None:
        encoder_depth = choose_encoder_depth(config.model, model_depth(config), config.aligns_attention)
    if config.aligns_attention:
        layer_map = str(choose_layer_map(layer_map, config.model))
    family, size = find_size(config.model)
    same_size = {name: None for name in SIZES if getattr(config, name) == size.get(name)}
    return replace(
        config,
        enc_type="None" if (config.enc_type or "none").lower() == "none" else config.enc_type,  # as REPA records it
        num_classes=num_classes if config.num_classes is None else config.num_classes,
        encoder_depth=encoder_depth,
        layer_map=layer_map,
        disp_depth=config.disp_depth or max(1, model_depth(config) // 4),
        block_out_t=config.block_out_t or max(1, round(0.7 * model_depth(config))),
        prediction=config.prediction or family.prediction,
        **same_size,  # type: ignore[arg-type]
        **own_settings(config),
    )


def check_folder_name(name: str, value: str) -> None:
    """Raise UserError, naming the flag, if a value is not the plain name of one folder."""
    fits = 0 < len(value.encode(errors="replace")) <= LONGEST_NAME and value not in (".", "..")
    if not fits or value != value.strip() or "/" in value or not value.isprintable():
        raise UserError(
            f"--{name.replace('_', '-')} must be a plain name of a folder, without / and at most {LONGEST_NAME} bytes "
            f"long, got {value[:60]!r}"
        )


def sections() -> dict[str, list[str]]:
    """The settings of each section of a --config file, in their order."""
    begins = {first: section for section, first in SECTIONS.items()}
    found: dict[str, list[str]] = {}
    for field in fields(TrainConfig):
        if field.name in begins:
            settings = found[begins[field.name]] = []
        settings.append(field.name)
    return found


def describe_run(config: TrainConfig) -> str:
    """The settings of the run's preset as flags, with the run's values; overridden ones are followed by the preset's
    own."""
    parts = []
    for key, own in PRESETS[config.preset].items():
        value = getattr(config, key)
        parts.append(f"--{key.replace('_', '-')} {value}" + ("" if value == own else f" (preset: {own})"))
    return " ".join(parts)


def list_presets() -> str:
    """Every preset with its settings, one per paragraph."""
    return "\n\n".join(f"{name}\n  {describe_run(TrainConfig.from_preset(name))}" for name in PRESETS)
