"""The benchmark of sampling: its baseline forecasts as haste does, its FLOPs and speed-ups are what they are called."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from benchmark_scripts import script_folder
from haste.errors import UserError

ROOT = Path(__file__).parents[2] / "benchmarks" / "sampling"


with script_folder(ROOT):
    import eager
    import report
    import rounds
    import run
    import variants
    from cases import make_case

SHORT = {"num_steps": 8, "interval": 2, "order": 2}


def tiny(model="tiny", **settings):
    return make_case(model, None, 2, "float32", "cpu", **{**SHORT, **settings})


def make_run(variant, case):
    return variants.Run(variant, variants.LAUNCHED, case, variants.make_model(case))


@pytest.mark.parametrize("model", ["tiny", "tiny DiT", "tiny MM-DiT"])
@pytest.mark.parametrize(("interval", "order"), [(2, 0), (3, 1), (3, 4), (4, 2)])
def test_the_eager_baseline_samples_what_haste_samples_per_module(model, interval, order):
    case = tiny(model, num_steps=20, interval=interval, order=order)
    ours, baseline, uncached = (make_run(v, case)() for v in (variants.MODULE, variants.EAGER, variants.UNCACHED))
    torch.testing.assert_close(ours, baseline, rtol=1e-5, atol=1e-5)
    assert (baseline - uncached).abs().max() > 1e-4, "a forecast is no full step"


def test_the_eager_baseline_has_the_published_schedule():
    assert eager.full_steps(12, 4) == [0, 1, 5, 9]
    assert [len(eager.full_steps(50, interval)) for interval in (3, 4, 5, 6)] == [18, 14, 11, 10]
    baseline = make_run(variants.EAGER, tiny(num_steps=12, interval=4))
    baseline()
    assert [full for full, *_ in baseline.stopwatch.calls] == [step in (0, 1, 5, 9) for step in range(12)]


def test_the_eager_baseline_keeps_every_difference_of_every_module():
    case = tiny()
    baseline = make_run(variants.EAGER, case)
    baseline()
    assert baseline.cache_bytes == 2 * 4 * (case.order + 1) * case.batch * case.tokens * 32 * 4


def test_flops_are_those_of_products_convolution_and_attention():
    case = tiny()
    row = {}
    rounds.first_run(make_run(variants.UNCACHED, case), row)
    rows, tokens, width = case.batch, case.batch * case.tokens, 32
    block = 12 * tokens * width**2 + 2 * rows * case.tokens**2 * width + 6 * rows * width**2
    ends = 2 * tokens * width * 16 + rows * (256 + width) * width + 2 * rows * width**2
    assert row["flops"] == case.num_steps * 2 * (4 * block + ends)

    fewer = {}
    rounds.first_run(make_run(variants.FEWER, case), fewer)
    assert fewer["flops"] * case.num_steps == row["flops"] * fewer["num_steps"] and fewer["num_steps"] == 5


def test_a_skipped_step_has_the_flops_of_its_conditioning():
    case, uncached, cached = tiny(), {}, {}
    rounds.first_run(make_run(variants.UNCACHED, case), uncached)
    rounds.first_run(make_run(variants.EAGER, case), cached)
    assert (cached["num_full"], cached["num_steps"]) == (5, 8)
    blocks = 4 * (12 * case.batch * case.tokens * 32**2 + 2 * case.batch * case.tokens**2 * 32)
    assert uncached["flops"] - cached["flops"] == 3 * 2 * blocks


def test_every_call_of_the_model_is_timed_and_a_run_is_longer_than_its_calls():
    contender = make_run(variants.MODULE, tiny())
    times = rounds.time_in_rounds({"it": contender}, rounds=2, device="cpu")["it"]
    full, skipped = contender.stopwatch.seconds(full=True), contender.stopwatch.seconds(full=False)
    assert (len(full), len(skipped)) == (5, 3) and min(full + skipped) > 0
    assert times["seconds"][-1] > sum(full) + sum(skipped)
    assert [len(values) for values in times.values()] == [2, 2, 2]


def test_seconds_of_the_processor_leave_out_what_others_take(monkeypatch):
    case = make_case("tiny", None, 2, "float32", "cpu", **SHORT, processor_time=True)
    contender = make_run(variants.UNCACHED, case)
    model = contender.stopwatch.model
    contender.stopwatch.model = lambda *inputs: (time.sleep(0.02), model(*inputs))[1]
    begin = time.perf_counter()
    seconds = rounds.seconds_of(contender, "cpu")
    assert time.perf_counter() - begin - seconds > 8 * 0.02 * 0.9
    assert 0 < sum(contender.stopwatch.seconds(full=True)) < seconds
    assert case.as_json()["processor_time"] and "processor_time" not in tiny().as_json()


def test_the_script_measures_every_variant_and_plots_from_its_json_alone(tmp_path, capsys):
    run.main(run.Args(model=["tiny"], rounds=2, output=tmp_path, **SHORT))
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["name"] for row in result["rows"]] == [
        "uncached", "uncached, fewer steps", "eager TaylorSeer", "TaylorSeer per module", "TaylorSeer per block",
        "TaylorSeer whole model", "TaylorSeer output", "Δ-DiT",
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 2 and row["flops"] > 0 for row in result["rows"])
    assert [row["cache_bytes"] > 0 for row in result["rows"]] == [False, False] + 6 * [True]
    assert 0 < result["difference"] < 1e-6

    text = (tmp_path / "results.md").read_text()
    for name in ("results.md", "results.png"):
        (tmp_path / name).unlink()
    run.main(run.Args(output=tmp_path, plot_only=True))
    assert (tmp_path / "results.md").read_text() == text
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert text in capsys.readouterr().out


def test_of_mm_dit_the_eager_baseline_keeps_both_streams_and_haste_the_image_s(tmp_path):
    run.main(run.Args(model=["tiny MM-DiT"], rounds=1, output=tmp_path, **SHORT))
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    rows = {row["name"]: row for row in result["rows"]}
    per_token = (SHORT["order"] + 1) * 2 * 32 * 4  # batch 2, width 32, float32
    image, text = 2 * 4 * 16 * per_token, 2 * 3 * 5 * per_token  # of two modules in so many blocks, so many tokens
    assert rows["eager TaylorSeer"]["cache_bytes"] == image + text
    assert rows["TaylorSeer whole model"]["cache_bytes"] * 2 * 4 == image
    assert report.title(result).startswith("tiny MM-DiT, 5 + 16 tokens, batch 2, 8 steps")
    assert 0 < result["difference"] < 1e-6


def test_of_dit_noise_and_variance_are_sampled_by_guided_ddim(tmp_path):
    run.main(run.Args(model=["tiny DiT"], rounds=1, output=tmp_path, **SHORT))
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    rows = {row["name"]: row for row in result["rows"]}
    both = 2 * 2  # batch 2, cond and uncond
    assert rows["TaylorSeer output"]["cache_bytes"] == (SHORT["order"] + 1) * both * 2 * 4 * 8 * 8 * 4
    tokens, width = both * 16, 32
    block = 12 * tokens * width**2 + 2 * both * 16**2 * width + 6 * both * width**2
    ends = 3 * tokens * width * 16 + both * (256 + width) * width + 2 * both * width**2  # the head has two outputs
    assert rows["uncached"]["flops"] == 8 * 2 * (4 * block + ends)
    assert report.title(result) == "tiny DiT, 16 tokens, batch 2, 8 steps, guidance 1.5, float32, cpu"
    assert 0 < result["difference"] < 1e-6


def test_a_model_in_half_precision_is_verified_and_measured():
    result = rounds.measure(make_case("tiny", None, 2, "bfloat16", "cpu", **SHORT), rounds=1)
    assert not [row["absent"] for row in result["rows"] if "absent" in row]
    assert 1e-5 < result["difference"] < 1e-2


def test_what_is_compiled_is_compared_with_uncached_sampling_compiled(monkeypatch):
    """With a stand-in for the compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    result = rounds.measure(tiny(), 1, [variants.LAUNCHED, variants.COMPILED])
    rows = {row["name"]: row for row in result["rows"]}
    assert not [row["absent"] for row in rows.values() if "absent" in row]
    assert rows["Δ-DiT, torch.compile"]["flops"] == rows["Δ-DiT"]["flops"]
    assert report.uncached_of(result, rows["Δ-DiT, torch.compile"])["name"] == "uncached, torch.compile"
    assert "eager TaylorSeer, torch.compile" not in rows


def test_uncached_sampling_in_a_graph_is_what_it_is_without(monkeypatch):
    """With a stand-in for the capture: a replay computes anew from the captured inputs."""

    def capture(function, inputs):
        output = function(*inputs)
        return lambda: output.prediction.copy_(function(*inputs).prediction), output

    monkeypatch.setattr(variants.cuda_graphs, "capture", capture)
    case = tiny()
    graphed = variants.Run(variants.UNCACHED, variants.GRAPHS, case, variants.make_model(case))
    assert torch.equal(graphed(), make_run(variants.UNCACHED, case)())


def fake_row(name, seconds, flops, launch=""):
    return {"name": f"{name}, {launch}" if launch else name, "launch": launch, "num_steps": 50, "num_full": 14,
            "seconds": seconds, "flops": flops, "full_seconds": [0.02, 0.02], "skipped_seconds": [],
            "cache_bytes": 2**20, "peak_extra_bytes": None}  # fmt: skip


def fake_result(*rows, device="cpu"):
    machine = {"gpu": None, "threads": 2, "processor": "P", "cpu_capability": "avx2", "torch": "2", "haste_ext": "0",
               "commit": None, "date": "today"}  # fmt: skip
    case = {"model": "SiT-B/2", "resolution": 256, "batch": 1, "dtype": "float32", "device": device, "num_steps": 50,
            "interval": 4, "order": 4, "tokens": 256}  # fmt: skip
    return {"case": case, "machine": machine, "settings": {"rounds": 2}, "difference": 1e-7, "rows": list(rows)}


def test_speedups_are_taken_within_a_round_and_held_against_the_flops():
    uncached, module = fake_row("uncached", [6.0, 12.0], 40), fake_row("TaylorSeer per module", [2.0, 4.0], 10)
    block = fake_row("TaylorSeer per block", [1.6, 3.2], 10)
    text = report.section(fake_result(uncached, module, block))
    assert "| TaylorSeer per module | 14 of 50 | 3.000 | 2.400 – 3.600 | 3.00× | 4.00× | 0.75 | 0.75 – 0.75 |" in text
    assert "per module: 0.75 of its FLOPs speed-up in seconds; target 0.9: missed." in text
    assert "per block: 0.94 of its FLOPs speed-up in seconds; target 0.9: met." in text


def test_a_launch_is_compared_with_uncached_sampling_launched_alike():
    rows = [fake_row("uncached", [6.0, 6.0], 40), fake_row("uncached", [3.0, 3.0], 40, "CUDA graphs")]
    graphed = fake_row("TaylorSeer whole model", [1.0, 1.0], 10, "CUDA graphs")
    text = report.section(fake_result(*rows, graphed, device="cuda"))
    assert "whole model, CUDA graphs: 0.75 of its FLOPs speed-up in seconds; target 0.95: missed." in text


def test_what_did_not_fit_is_said_in_the_table():
    absent = {"name": "eager TaylorSeer", "launch": "", "absent": "it wants more memory than there is"}
    text = report.section(fake_result(fake_row("uncached", [1.0, 1.0], 1), absent))
    assert "| eager TaylorSeer | it wants more memory than there is |" in text


def test_what_does_not_fit_is_left_out_in_every_launching(monkeypatch):
    first_run = rounds.first_run

    def too_small(contender, row):
        if contender.variant is variants.MODULE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return first_run(contender, row)

    monkeypatch.setattr(rounds, "first_run", too_small)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    result = rounds.measure(tiny(), 1, [variants.LAUNCHED, variants.COMPILED])
    absent = {row["name"]: row["absent"] for row in result["rows"] if "absent" in row}
    why = "it wants more memory than there is"
    assert absent == {"TaylorSeer per module": why, "TaylorSeer per module, torch.compile": why}
    assert result["difference"] is None and why in report.section(result)


def test_images_that_differ_are_not_timed():
    images = {variants.EAGER.name: torch.ones(4), variants.MODULE.name: torch.ones(4) + 1e-4}
    with pytest.raises(UserError, match="not timed: TaylorSeer per module, the images differ from those of eager"):
        rounds.compare(tiny(), images)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"model": ["SiT-Q/2"]},
            "--model must be one of SiT-B/2, SiT-XL/2, DiT-S/2, DiT-XL/2, MM-DiT-COCO, digits, tiny, tiny DiT, "
            "tiny MM-DiT, got 'SiT-Q/2'",
        ),
        ({"model": ["tiny"], "dtype": "fp8"}, "--dtype must be one of float32, bfloat16, got 'fp8'"),
        ({"model": ["digits"], "resolution": 9}, "--resolution must be a multiple of 2, such as 8, got 9"),
        ({"model": ["tiny"], "batch_size": [0]}, "--batch-size must be at least 1, got 0"),
        ({"model": ["tiny"], "num_steps": 0}, "--num-steps must be at least 1, got 0"),
        ({"model": ["tiny"], "num_steps": 8, "interval": 2, "order": 5}, "--order must be at most 4, as 5 of 8 "),
        ({"model": ["tiny"], "num_steps": 8, "interval": 9}, "--interval must be at most the number of steps"),
        (
            {"processor_time": True, "threads": 2},
            "--processor-time must come with --device cpu and --threads 1, got cpu",
        ),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"device": "tpu"}, "--device must be cpu or cuda, got 'tpu'"),
        ({"model": ["tiny"], "batch_size": [10**9]}, "tiny at --resolution 64 and --batch-size 1000000000 cannot be"),
        ({"plot_only": True}, "results.json must be a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run.main(run.Args(output=tmp_path, **flags))
