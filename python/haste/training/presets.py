"""The presets of `haste train`: named sets of settings, as papers published them."""

from __future__ import annotations

from typing import Any

from haste import registry

# Per size of SiT: HASTE's layer map, feature depth and τ at 256 and 512 pixels (arXiv 2505.16792, for DINOv2-B); REPA's
# feature depth (arXiv 2410.06940), which iREPA (arXiv 2512.10794) takes. S is in neither paper; it has B's depth and
# takes B's values. At 512 pixels HASTE gives only XL's τ; the other sizes keep theirs of 256.
_PUBLISHED = {
    "S": ("2:7,3:9,4:11", 5, {256: 100_000, 512: 100_000}, 4),
    "B": ("2:7,3:9,4:11", 5, {256: 100_000, 512: 100_000}, 4),
    "L": ("4:8,5:9,6:10,7:11", 8, {256: 250_000, 512: 250_000}, 8),
    "XL": ("4:8,5:9,6:10,7:11", 8, {256: 250_000, 512: 300_000}, 8),
}
_IREPA = {"projection_layer_type": "conv", "spnorm_method": "zscore"}


def _published_presets() -> dict[str, dict[str, Any]]:
    """haste-xl-256, repa-xl-256, irepa-xl-256, baseline-xl-256 and so on, for every size at 256 and 512 pixels."""
    presets = {}
    for resolution in (256, 512):
        for size, (layer_map, depth, tau, repa_depth) in _PUBLISHED.items():
            haste = {"attn_coeff": 0.5, "layer_map": layer_map, "encoder_depth": depth}
            methods: dict[str, dict[str, Any]] = {
                "haste": {**haste, "early_stop_point": tau[resolution]},
                "repa": {"attn_coeff": 0.0, "encoder_depth": repa_depth, "early_stop_point": -1},
                "irepa": {"attn_coeff": 0.0, "encoder_depth": repa_depth, "early_stop_point": -1, **_IREPA},
                "baseline": {"attn_coeff": 0.0, "proj_coeff": 0.0, "early_stop_point": -1},
            }
            for method, settings in methods.items():
                name = f"{method}-{size.lower()}-{resolution}"
                presets[name] = {"exp_name": name, "resolution": resolution, "model": f"SiT-{size}/2", **settings}
    return presets


def _reg_presets() -> dict[str, dict[str, Any]]:
    """reg-xl-256 and so on: REG (arXiv 2507.01467) is REPA's training with the class token denoised along, at REPA's
    depths. It has B, L and XL, at 256 and 512 pixels; S is not in the paper."""
    presets: dict[str, dict[str, Any]] = {}
    for name, settings in _published_presets().items():
        if name.startswith("repa-"):
            own = name.replace("repa", "reg")
            presets[own] = {**settings, "exp_name": own, "cls_coeff": 0.03}
    return presets


# xAR's training (arXiv 2502.20388, appendix). Warmup and decay are its 100 and 200 of 800 epochs, which end the run.
_XAR = {
    "resolution": 256, "dropout": 0.1, "weighting": "lognormal", "batch_size": 2048, "max_train_steps": 10**9,
    "epochs": 800, "learning_rate": 4e-4, "warmup_steps": 0.125, "decay_steps": 0.25, "min_learning_rate": 1e-5,
    "adam_beta2": 0.96, "adam_weight_decay": 0.02, "adam_decay": "matrices", "mixed_precision": "bf16",
}  # fmt: skip

# Nobody has published alignment of xAR: layers and depths are those of the SiT above of the same size (H as XL), τ is
# that after as many images, and nothing of it has been tried at this scale.
_XAR_SIZES = {"B": "B", "L": "L", "H": "XL"}


def _as_sit(name: str, like: str, model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """NAME, haste-NAME and repa-NAME of a model of which nobody has published alignment: with the layers and depths of
    the SiT of size `like`, and its τ after as many images."""
    layer_map, depth, tau, repa_depth = _PUBLISHED[like]
    steps = tau[256] * 256 // model["batch_size"]
    haste = {"attn_coeff": 0.5, "layer_map": layer_map, "encoder_depth": depth, "early_stop_point": steps}
    return {
        name: {"exp_name": name, **model, "attn_coeff": 0.0, "proj_coeff": 0.0},
        f"haste-{name}": {"exp_name": f"haste-{name}", **model, **haste},
        f"repa-{name}": {"exp_name": f"repa-{name}", **model, "encoder_depth": repa_depth},
    }


def _xar_presets() -> dict[str, dict[str, Any]]:
    """xar-b-256, haste-xar-b-256, repa-xar-b-256 and so on."""
    presets: dict[str, dict[str, Any]] = {}
    for size, like in _XAR_SIZES.items():
        presets |= _as_sit(f"xar-{size.lower()}-256", like, {**_XAR, "model": f"xAR-{size}"})
    return presets


def _dit_presets() -> dict[str, dict[str, Any]]:
    """dit-xl-256, haste-dit-xl-256, repa-dit-xl-256 and so on: DiT by its own objective (arXiv 2212.09748). HASTE gives
    DiT-XL the layers, depth, coefficients and τ of SiT-XL; the other sizes take those of theirs."""
    presets: dict[str, dict[str, Any]] = {}
    for name, settings in _published_presets().items():
        method, size, resolution = name.split("-")
        own = f"dit-{size}-{resolution}" if method == "baseline" else f"{method}-dit-{size}-{resolution}"
        model = settings["model"].replace("SiT", "DiT")
        presets[own] = {**settings, "exp_name": own, "model": model, "prediction": "noise"}
    return presets


# LightningDiT's training on VA-VAE's latents (arXiv 2501.01423; the public configs), but for its cosine loss. 80,000
# steps are 64 epochs; 1,000,000 are 800. Nobody has published its alignment: layers and depth are those of the SiT of
# the same size, τ is that after as many images, and nothing of it has been tried at this scale.
_LIGHTNINGDIT = {
    "resolution": 256, "weighting": "lognormal", "batch_size": 1024, "max_train_steps": 80_000,
    "learning_rate": 2e-4, "adam_beta2": 0.95, "mixed_precision": "bf16",
}  # fmt: skip


def _lightningdit_presets() -> dict[str, dict[str, Any]]:
    """lightningdit-xl-256, haste-lightningdit-xl-256, repa-lightningdit-xl-256, and for B."""
    presets: dict[str, dict[str, Any]] = {}
    for size in ("B", "XL"):
        model = {**_LIGHTNINGDIT, "model": f"LightningDiT-{size}/1"}
        presets |= _as_sit(f"lightningdit-{size.lower()}-256", size, model)
    return presets


# HASTE's text to image on MS-COCO (arXiv 2505.16792, appendix): 250,000 steps, of which the first 200,000 are aligned.
# REPA's runs and the baseline end after 150,000. The other settings are the defaults.
_MMDIT = {"resolution": 256, "model": "MM-DiT-COCO", "max_train_steps": 150_000}
_COCO_PRESETS: dict[str, dict[str, Any]] = {
    "mmdit-coco": {"exp_name": "mmdit-coco", **_MMDIT, "attn_coeff": 0.0, "proj_coeff": 0.0},
    "haste-mmdit-coco": {
        "exp_name": "haste-mmdit-coco", **_MMDIT, "attn_coeff": 0.5, "layer_map": "4:8,5:9,6:10,7:11",
        "encoder_depth": 8, "max_train_steps": 250_000, "early_stop_point": 200_000,
    },
    "repa-mmdit-coco": {"exp_name": "repa-mmdit-coco", **_MMDIT, "encoder_depth": 8},
}  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    **registry.PRESETS, **_published_presets(), **_reg_presets(), **_dit_presets(), **_xar_presets(), **_COCO_PRESETS,
    **_lightningdit_presets(),
}  # fmt: skip
"""The settings of each preset, by its name."""
