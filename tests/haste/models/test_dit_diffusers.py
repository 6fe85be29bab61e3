"""A DiT as diffusers' DiTPipeline, both ways: the same numbers, the same weights, and what is refused."""

from __future__ import annotations

import json
import shutil

import haste
import pytest
import torch
from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.generation.export import export_pipeline
from haste.generation.pipeline import Sampler
from haste.models.dit_diffusers import from_diffusers, to_diffusers
from haste.models.dit_times import NAMES, features, fit_times
from haste.models.layers import TimestepEmbedder
from haste.samplers.labels import image_generator
from haste.training.checkpoint import initial_checkpoint, read_checkpoint
from haste.training.pipeline_folder import TIMES_FILE
from haste.weights import BrokenCheckpoint
from latent_dit import CLASSES, SHAPE, random_dit, write_dit
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

TENS = torch.tensor([0, 40, 500, 990])
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_dit(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(checkpoint):
    return export_pipeline(checkpoint, checkpoint.parent / "pipeline")


@pytest.fixture
def copy(folder, tmp_path):
    """The exported folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "pipeline")


def transformer_of(model, fit=True, dtype=torch.float64):
    """diffusers' transformer with the weights of a DiT of SHAPE."""
    weights, config, _ = to_diffusers(model.state_dict(), SHAPE, fit)
    theirs = diffusers.DiTTransformer2DModel(
        **{name: value for name, value in config.items() if not name.startswith("_")}
    ).to(dtype)
    assert not theirs.load_state_dict(weights, strict=True).missing_keys
    return theirs.eval()


def with_dits_times(transformer):
    """The transformer with DiT's frequencies of times, which its blocks do not have by any setting."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer


@torch.no_grad()
def relative_error(model, transformer, t):
    """Of noise and variance, for images of every class and of none."""
    x = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=model.dtype)
    ours = model(x, t.float(), torch.tensor([0, 1, 2, 3])).prediction
    theirs = transformer(x, timestep=t, class_labels=torch.tensor([0, 1, 2, 1000])).sample
    return ((ours - theirs).norm() / ours.norm()).item()


# ---- the same numbers ----


def test_all_but_the_frequencies_of_times_is_the_same():
    model = random_dit(torch.float64)
    assert (
        relative_error(model, with_dits_times(transformer_of(model, fit=False)), torch.tensor([1, 333, 667, 999]))
        < 1e-14
    )


def test_fitted_times_give_the_same_where_short_runs_go():
    model = random_dit(torch.float64)
    assert relative_error(model, transformer_of(model), TENS) < 1e-6
    assert relative_error(model, transformer_of(model, fit=False), TENS) > 1e-3  # as published folders have it


@pytest.mark.parametrize(
    ("size", "width", "tens", "every"),
    [("S", 384, 1e-6, 0.2), ("B", 768, 4e-6, 2e-3), ("L", 1024, 6e-6, 6e-6), ("XL", 1152, 3e-6, 3e-6)],
)
def test_times_are_fitted_as_well_as_a_width_allows(size, width, tens, every):
    """With -s it prints the table of docs/diffusers.md."""
    weights = embedder(width)
    fitted = fit_times(weights, "dit", "diffusers")
    as_they_are, errors = embedding_error(weights, weights).max(), embedding_error(weights, fitted.weights)
    single, half = (
        embedding_error(weights, fitted.weights, dtype, 10).max() for dtype in (torch.float32, torch.float16)
    )
    print(f"\nDiT-{size} as they are {as_they_are:.1f}, tens {errors[::10].max():.1e}, all {errors.max():.1e}, "
          f"tens in float32 {single:.1e}, in float16 {half:.1e}")  # fmt: skip
    assert fitted.error_of_tens < tens and fitted.error < every
    assert errors.max() == pytest.approx(fitted.error, rel=1e-3)
    assert errors[::10].max() == pytest.approx(fitted.error_of_tens, rel=1e-3)
    assert as_they_are > 0.9 and single < 3e-4 and half < 0.1


def embedder(width):
    """As training begins."""
    torch.manual_seed(0)
    made = TimestepEmbedder(width)
    for layer in (made.mlp[0], made.mlp[2]):
        torch.nn.init.normal_(layer.weight, std=0.02)
        torch.nn.init.zeros_(layer.bias)
    return {f"t_embedder.{name}": value.detach() for name, value in made.state_dict().items()}


def embedding_error(weights, fitted, dtype=torch.float64, every=1):
    """|fitted − true| / |true| of each time, or of every tenth, where the fitted one is computed in `dtype`."""

    def embed(of_times, weights, dtype):
        first, first_bias, second, second_bias = (weights[name].to(dtype) for name in NAMES)
        return torch.nn.functional.silu(of_times.to(dtype) @ first.T + first_bias) @ second.T + second_bias

    true = embed(features("dit")[::every], weights, torch.float64)
    return (embed(features("diffusers")[::every], fitted, dtype).double() - true).norm(dim=1) / true.norm(dim=1)


@pytest.mark.parametrize(("which", "shift"), [("dit", 0), ("diffusers", 1)])
def test_features_of_times_are_those_of_diffusers(which, shift):
    theirs = diffusers.models.embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    assert torch.equal(features(which), theirs(torch.arange(1000)).double())


@pytest.mark.parametrize(("guidance", "steps"), [(1.0, 20), (2.5, 10)])
def test_a_pipeline_makes_the_images_of_haste(checkpoint, folder, guidance, steps):
    pipe = diffusers.DiTPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_steps": steps, "timestep_spacing": "leading", "cfg_scale": guidance, "guided_channels": 4}
    sampler = Sampler(haste.load_checkpoint(checkpoint, device="cpu"), SamplingConfig(**settings, labels="2,0,1"))
    ours = sampler.run(sampler.start_of(range(3)))
    seen, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda latents: seen.append(latents) or decode(latents)
    noise = [image_generator(0, index, "noise") for index in range(3)]
    images = pipe([2, 0, 1], guidance, noise, steps, output_type="pt").images
    theirs = seen[0] * pipe.vae.config.scaling_factor
    assert ((ours - theirs).norm() / ours.norm()).item() < 1e-5
    assert (sampler._to_images(ours) / 2 + 0.5 - images).abs().max() < 1e-4


def test_a_pipeline_knows_the_classes(folder):
    pipe = diffusers.DiTPipeline.from_pretrained(str(folder))
    assert pipe.get_label_ids(["red fox", "tench"]) == [0, 2]


def test_a_cache_of_haste_goes_on_the_pipeline(folder):
    pipe = diffusers.DiTPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    with haste.cached(pipe, interval=2, order=1) as handle:
        pipe([1], generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="pt")
    assert 0 < handle.report.full_calls < 10


# ---- the same weights ----


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_haste_to_folder_to_haste_bit_for_bit(checkpoint, tmp_path, fit, ema):
    export_pipeline(checkpoint, tmp_path / "pipeline", ema=ema, fit_times=fit)
    before = haste.load_checkpoint(checkpoint, ema, device="cpu")
    for path in (tmp_path / "pipeline", tmp_path / "pipeline/transformer"):
        after = haste.load_checkpoint(path, device="cpu")
        assert after.family.name == "dit" and after.layout == before.layout
        state = after.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in before.model.state_dict().items())


@pytest.mark.parametrize("fit", [True, False])
def test_folder_to_haste_to_folder_bit_for_bit(folder, tmp_path, fit):
    """But for fitted times, whose least squares round by where memory lies."""
    first = export_pipeline(folder, tmp_path / "first", fit_times=fit)
    second = export_pipeline(first, tmp_path / "second", fit_times=fit)
    assert (first / "vae" / WEIGHTS).read_bytes() == (second / "vae" / WEIGHTS).read_bytes()
    before, after = (load_file(each / "transformer" / WEIGHTS) for each in (first, second))
    assert list(before) == list(after)
    for name, value in before.items():
        if fit and "timestep_embedder" in name:
            torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(after[name], value), name
    if fit:
        assert (first / "transformer" / TIMES_FILE).read_bytes() == (second / "transformer" / TIMES_FILE).read_bytes()
    for name in ("transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json"):
        assert without_paths(first / name) == without_paths(second / name)


def without_paths(file):
    content = json.loads(file.read_text())
    content.get("_haste", {}).pop("fitted_times", None)
    return {name: value for name, value in content.items() if name != "_name_or_path"}


def test_a_published_folder_holds_the_weights_of_dit(folder, copy, tmp_path):
    """As facebook/DiT-XL-2-256: an older class name, pickled weights, DiT's times as they are, no record of haste."""
    copied = export_pipeline(folder, tmp_path / "copied", fit_times=False)
    config = json.loads((copied / "transformer/config.json").read_text())
    weights = load_file(copied / "transformer/diffusion_pytorch_model.safetensors")
    del config["_haste"]
    published = {**config, "_class_name": "Transformer2DModel", "norm_eps": 1e-5, "num_vector_embeds": None}
    shutil.rmtree(copy / "transformer")
    (copy / "transformer").mkdir()
    (copy / "transformer/config.json").write_text(json.dumps(published))
    torch.save(weights, copy / "transformer/diffusion_pytorch_model.bin")
    found = haste.load_checkpoint(copy, device="cpu")
    assert found.num_classes == 1000  # as its table of labels has no fewer
    state = haste.load_checkpoint(folder, device="cpu").model.state_dict()
    for name, value in found.model.state_dict().items():
        if "embedding_table" not in name:
            assert torch.equal(value, state[name]), name


def test_a_pipeline_that_diffusers_saved_again_is_fitted_back(folder, tmp_path):
    """Without the file of DiT's times, which diffusers does not know."""
    diffusers.DiTPipeline.from_pretrained(str(folder)).save_pretrained(tmp_path)
    again = haste.load_checkpoint(tmp_path, device="cpu")
    before = haste.load_checkpoint(folder, device="cpu")
    assert again.num_classes == 3 and again.model.null_label == 3
    t = TENS.float()
    ours, known = again.model.t_embedder(t), before.model.t_embedder(t)
    assert (ours - known).norm() / known.norm() < 1e-5
    changed = [
        name
        for name, value in before.model.state_dict().items()
        if not torch.equal(value, again.model.state_dict()[name])
    ]
    assert set(changed) <= set(NAMES)


def test_times_that_were_trained_on_are_not_replaced_by_those_before(folder, copy):
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.endswith("timestep_embedder.linear_2.bias"):
            weights[name] += 1
    save_file(weights, path)
    trained, before = (
        haste.load_checkpoint(each, device="cpu").model.t_embedder(TENS.float()) for each in (copy, folder)
    )
    assert ((trained - 1 - before).norm() / before.norm()).item() < 1e-4


def test_what_the_folder_tells(folder):
    found = haste.load_checkpoint(folder, device="cpu")
    assert found.class_names == CLASSES and found.run == folder
    sampler = Sampler(found, SamplingConfig(num_steps=2))
    assert sampler.latents.vae == str((folder / "vae").resolve()) and sampler.latents.scale == (0.5,) * 4
    assert sampler.sample(range(2))[0].shape == (2, 8, 8, 3)


def test_the_scale_of_training_is_the_pipelines(tmp_path):
    """Which may be another than the VAE's config has."""
    path = write_dit(tmp_path)
    content = torch.load(path, weights_only=False)
    content["latents"]["scale"] = (0.25,) * 4
    torch.save(content, path)
    folder = export_pipeline(path, tmp_path / "pipeline")
    assert json.loads((folder / "vae/config.json").read_text())["scaling_factor"] == 0.25
    assert haste.load_checkpoint(folder, device="cpu").recorded["latents"]["scale"] == (0.25,) * 4


def test_a_run_may_begin_from_a_folder(folder):
    file = initial_checkpoint(folder)
    assert file == initial_checkpoint(folder / "transformer")
    content = read_checkpoint(file)
    assert content["model_config"] == {"family": "dit", **SHAPE}
    assert torch.equal(content["model"]["blocks.0.attn.qkv.weight"], content["ema"]["blocks.0.attn.qkv.weight"])


def test_a_model_without_a_null_class(tmp_path, caplog):
    path = write_dit(tmp_path, class_dropout_prob=0.0)
    folder = export_pipeline(path, tmp_path / "pipeline")
    assert "guidance_scale=1" in caplog.text
    pipe = diffusers.DiTPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], 1.0, num_inference_steps=2, output_type="pt").images.isfinite().all()
    assert pipe([1], 4.0, num_inference_steps=2, output_type="pt").images.isnan().all()
    found = haste.load_checkpoint(folder, device="cpu")
    assert found.model.null_label is None and found.num_classes == 3


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"qk_norm": True}, "must be without --qk-norm"),
        ({"mlp_ratio": 2.0}, "must have mlp_ratio 4"),
        ({"num_classes": 1001}, "must have at most 1000 classes"),
    ],
)
def test_models_that_diffusers_cannot_compute(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        to_diffusers(random_dit(**changes).state_dict(), {**SHAPE, **changes})


def test_positions_of_ones_own():
    model = random_dit()
    model.pos_embed.data += 0.1
    with pytest.raises(UserError, match="must have DiT's positions"):
        to_diffusers(model.state_dict(), SHAPE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "must be a DiTTransformer2DModel"),
        ({"out_channels": 4}, "out_channels must be twice in_channels, 8"),
        ({"num_layers": 3}, "x must hold 3 blocks, the num_layers of its config.json, got 2"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"norm_type": "ada_norm"}, "norm_type"),
        (
            {"_haste": {"num_classes": 2000, "null_class": True}},
            "num_classes in config.json of x must be from 1 to 1000",
        ),
    ],
)
def test_transformers_that_dit_cannot_compute(changes, sentence):
    weights, config, _ = to_diffusers(random_dit().state_dict(), SHAPE, fit=False)
    with pytest.raises(UserError, match=sentence):
        from_diffusers(weights, {**config, **changes}, None, "x")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"].add_(1), "one embedder"),
        (lambda w: w.pop("transformer_blocks.1.attn1.to_k.bias"), "lacks attn1.to_k of block 1"),
        (lambda w: w.update({"caption_projection.weight": torch.ones(1)}), "got caption_projection.weight"),
    ],
)  # fmt: skip
def test_weights_of_something_else(change, sentence):
    weights, config, _ = to_diffusers(random_dit().state_dict(), SHAPE, fit=False)
    change(weights)
    with pytest.raises(UserError, match=sentence):
        from_diffusers(weights, config, None, "x")


def test_weights_that_are_not_finite():
    model = random_dit()
    model.t_embedder.mlp[0].weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"embedder of times must be finite .* t_embedder\.mlp\.0\.weight"):
        to_diffusers(model.state_dict(), SHAPE)


def test_a_vae_without_a_scale_has_that_of_diffusers(copy):
    file = copy / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": None}))
    assert set(haste.load_checkpoint(copy, device="cpu").recorded["latents"]["scale"]) == {0.18215}


@pytest.mark.parametrize("name", [WEIGHTS, TIMES_FILE])
def test_a_file_that_was_cut_short_is_named(copy, name):
    file = copy / "transformer" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BrokenCheckpoint, match=f"{name} is not a valid checkpoint"):
        haste.load_checkpoint(copy)


def test_damaged_folders(copy):
    file = copy / "transformer/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_attention_heads": 8}))
    with pytest.raises(UserError, match="must have the shape"):
        haste.load_checkpoint(copy)
    file.unlink()
    with pytest.raises(UserError, match=r"config\.json must be the config of a transformer"):
        haste.load_checkpoint(copy)
    (copy / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="--ckpt must be the folder of a DiTPipeline .*lacks transformer/diffusion_"):
        haste.load_checkpoint(copy)
    (copy / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="--init-from must be the folder of a DiTPipeline .*FluxPipeline"):
        initial_checkpoint(copy)
