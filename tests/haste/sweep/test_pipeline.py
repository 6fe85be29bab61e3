"""`haste sweep --pipeline`: a diffusers pipeline on disk, its cached images beside those of its own uncached run."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
from haste.cli.main import main
from haste.errors import UserError
from haste.generation.config import SamplingConfig
from haste.sweep.pipeline import Pipeline, count_cost, digest, read_prompts
from PIL import Image
from pipelines import tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

QUICK = (
    "--steps",
    "10",
    "--num-steps",
    "3",
    "--num-images",
    "2",
    "--repeats",
    "1",
    "--intervals",
    "3",
    "--orders",
    "1",
)
WORDS = ("a", "red", "cat", "dog", "on", "the", "hill")


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    pipe = tiny_pipeline("dit").pipe
    pipe.register_to_config(id2label={3: "hen, biddy", 7: "cock"})
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-dit"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """FLUX with text encoders whose tokenizers know a few words."""
    home = tmp_path_factory.mktemp("pipelines")
    tokens = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = dict(zip([*tokens, *[f"{token}</w>" for token in tokens[2:]]], range(60), strict=False))
    (home / "vocab.json").write_text(json.dumps(vocabulary))
    (home / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(home / "vocab.json"), str(home / "merges.txt"), model_max_length=16)
    clip = CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    t5 = T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    pipe = tiny_pipeline("flux kontext").pipe
    whole = diffusers.FluxPipeline(
        scheduler=pipe.scheduler, vae=pipe.vae, transformer=pipe.transformer, tokenizer=tokenizer,
        text_encoder=CLIPTextModel(clip).eval(), tokenizer_2=tokenizer, text_encoder_2=T5EncoderModel(t5).eval(),
    )  # fmt: skip
    whole.save_pretrained(home / "tiny-flux")
    return home / "tiny-flux"


def records_of(folder):
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


def test_a_pipeline_for_classes_is_swept_and_resumed(dit_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    flags = ("--pipeline", str(dit_folder), *QUICK, "--prompts", "3,cock", "--output", str(out))
    grid = ("--caches", "newton", "reuse", "--granularities", "model", "output")
    main(["sweep", *flags, *grid])
    printed = capsys.readouterr().out
    records = records_of(out)
    points = [(r["point"]["cache"], r["point"].get("granularity"), r["point"]["num_steps"]) for r in records]
    assert points == [("none", None, 10), ("none", None, 3), ("newton", "model", 10), ("newton", "output", 10),
                      ("reuse", "model", 10), ("reuse", "output", 10)]  # fmt: skip
    assert records[0]["sweep"]["prompts"] == [3, 7] and records[0]["sweep"]["model"] == "DiTPipeline of tiny-dit"
    full, fewer, model, output = records[:4]
    assert full["psnr"] is None and fewer["psnr"] < model["psnr"]
    assert (full["calls"], full["full_calls"], model["calls"], model["full_calls"]) == (10, 10, 10, 4)
    assert model["full_steps"] == [0, 1, 4, 7]
    assert full["flops"] > model["flops"] > output["flops"]
    assert model["cache_bytes"] > 0 and output["cache_bytes"] > 0 == full["cache_bytes"]
    table = (out / "sweep.md").read_text()
    assert "# DiTPipeline of tiny-dit, beside 10 steps: 2 images a point" in table and "FD" not in table
    assert "Closer to the full run" in printed and "Closer to the full run" in table
    Image.open(out / "sweep.png").verify()

    monkeypatch.setattr(Pipeline, "_sample_one", lambda *_: pytest.fail("it was known"))
    before = (out / "sweep.jsonl").read_text()
    main(["sweep", *flags, *grid])
    assert (out / "sweep.jsonl").read_text() == before and capsys.readouterr().out == printed
    (out / "sweep.md").unlink()
    main(["sweep", *flags, "--plot-only"])
    assert (out / "sweep.md").read_text() == table


def test_a_pipeline_for_prompts_of_a_size(flux_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red cat\n\nthe dog on the hill\n")
    out = tmp_path / "out"
    main(["sweep", "--pipeline", str(flux_folder), *QUICK, "--prompts", str(tmp_path / "prompts.txt"), "--height", "32",
          "--width", "48", "--caches", "newton", "--granularities", "model", "--orders", "1", "9",
          "--output", str(out)])  # fmt: skip
    records = records_of(out)
    assert records[0]["sweep"]["prompts"] == ["a red cat", "the dog on the hill"]
    assert records[0]["sweep"]["size"] == {"height": 32, "width": 48}
    assert [record["point"]["num_steps"] for record in records] == [10, 3, 10]
    assert records[1]["psnr"] < records[2]["psnr"]
    assert (
        "skipped: Newton per model, interval 3, order 9, 10 steps: --order must be at most 3" in capsys.readouterr().out
    )


def load(folder, **changes):
    from haste.sweep.config import SweepConfig

    return Pipeline.load(SweepConfig(**{"pipeline": folder, "prompts": "3", **changes}))


def test_images_are_those_of_their_number_and_no_cache_stays(dit_folder):
    pipeline = load(dit_folder, prompts="3,7")
    plain = pipeline.sample([0, 1, 2], 10)
    assert plain.shape == (3, 16, 16, 3) and plain.dtype == np.uint8
    assert np.array_equal(plain[1:2], pipeline.sample([1], 10)) and not np.array_equal(plain[0], plain[2])
    settings = SamplingConfig(num_steps=10, cache="taylor", granularity="model", interval=3, order=1)
    with pipeline.cached(settings) as handle:
        cost = count_cost(pipeline, settings, handle)
        assert not np.array_equal(pipeline.sample([0], 10), plain[:1])
    assert cost["full_steps"] == [0, 1, 4, 7] and cost["calls"] == 10
    assert np.array_equal(pipeline.sample([0], 10), plain[:1])


def test_another_pipeline_has_another_digest(dit_folder, tmp_path):
    shutil.copytree(dit_folder, tmp_path / "same")
    assert digest(tmp_path / "same") == digest(dit_folder)
    (tmp_path / "same" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert digest(tmp_path / "same") != digest(dit_folder)


def test_prompts_are_lines_or_classes(dit_folder, tmp_path):
    pipe = load(dit_folder).pipe
    assert read_prompts(pipe, "") == list(range(10))
    assert read_prompts(pipe, "cock, 999") == [7, 999]
    (tmp_path / "classes.txt").write_text("3\nbiddy\n")
    assert read_prompts(pipe, str(tmp_path / "classes.txt")) == [3, 3]


@pytest.mark.parametrize("prompts", ["1000", "cat", "3,-1"])
def test_a_class_that_is_not_there_is_refused(dit_folder, prompts):
    with pytest.raises(UserError, match="--prompts must be classes from 0 to 999"):
        load(dit_folder, prompts=prompts)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", *arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "either --ckpt or --pipeline, got neither"),
        (("--pipeline", "x", "--ckpt", "y"), "either --ckpt or --pipeline, got both"),
        (("--pipeline", "nowhere"), "--pipeline must be the folder of a diffusers pipeline"),
        (("--pipeline", "nowhere", "--cfg-scale", "2"), "--cfg-scale must be left out with --pipeline"),
        (("--pipeline", "nowhere", "--features", "digits"), "--features must be left out with --pipeline"),
        (("--pipeline", "nowhere", "--timestep-spacing", "leading"), "--timestep-spacing must be left out with"),
        (("--pipeline", "nowhere", "--guided-channels", "3"), "--guided-channels must be left out with --pipeline"),
        (("--pipeline", "nowhere", "--guidance-low", "0.3"), "--guidance-low must be left out with --pipeline"),
        (("--pipeline", "nowhere", "--num-fid-samples", "9"), "--num-fid-samples must be left out with --pipeline"),
        (("--pipeline", "nowhere", "--height", "0"), "--height must be"),
        (("--ckpt", "x", "--num-images", "3"), "--num-images must be left out with --ckpt"),
    ],
)
def test_flags_that_do_not_fit_are_named(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *flags)
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_no_such_pipeline_are_named(capsys, tmp_path, dit_folder, flux_folder):
    unet = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(unet))
    assert "that has a transformer, got" in refusal(capsys, "--pipeline", str(tmp_path))
    broken = {"_class_name": "NoSuchPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(broken))
    assert "cannot be loaded" in refusal(capsys, "--pipeline", str(tmp_path))
    assert "--height must be left out with DiTPipeline" in refusal(
        capsys, "--pipeline", str(dit_folder), "--height", "64"
    )
    assert "--prompts must be a prompt" in refusal(capsys, "--pipeline", str(flux_folder))
