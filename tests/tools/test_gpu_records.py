"""A line per finished test: the pytest plugin that writes them, and what is read from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu import records

TOOLS = Path(__file__).parents[2] / "tools"
TESTS = """
import os, pytest
@pytest.fixture
def broken():
    yield
    raise RuntimeError
@pytest.mark.parametrize("operation", ("attn_align_loss", "token_cosine_loss", "taylor_extrapolate_blocks"))
def test_one(operation):
    assert operation != "token_cosine_loss"
def test_none(): pytest.skip("not here")
def test_breaks_afterwards(broken): pass
"""
DIES = "def test_dies():\n    os._exit(3)\ndef test_after(): pass\n"


def run(tmp_path, tests, *flags) -> records.Tally:
    (tmp_path / "test_it.py").write_text(tests)
    environment = {**os.environ, "PYTHONPATH": f"{TOOLS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {records.FILE: str(tmp_path / "out.jsonl"), records.STAGE: "here"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "gpu.record_tests",
        *flags,
        "test_it.py",
    ]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    return records.tally(tmp_path / "out.jsonl", "here")


def short(names):
    return {name.rpartition("::")[2]: value for name, value in names.items()}


RESULTS = {
    "test_one[attn_align_loss]": "passed",
    "test_one[token_cosine_loss]": "failed",
    "test_one[taylor_extrapolate_blocks]": "passed",
    "test_none": "skipped",
    "test_breaks_afterwards": "failed",
}


def test_every_test_has_its_line_and_a_death_loses_only_what_follows(tmp_path):
    found = run(tmp_path, TESTS + DIES)
    assert short(found.results) == RESULTS
    assert [name.rpartition("::")[2] for name in found.lost] == ["test_dies", "test_after"]
    assert found.running.endswith("test_dies")
    assert found.counts()["taylor_extrapolate"] == {"passed": 1, "failed": 0, "skipped": 0, "lost": 0}
    assert found.counts("attn_align_loss")["attn_align_loss"] == {"passed": 1, "failed": 1, "skipped": 1, "lost": 2}


@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_in_parallel_the_death_of_one_worker_costs_one_test(tmp_path):
    found = run(tmp_path, TESTS + DIES, "-n", "2")
    assert short(found.results) == {**RESULTS, "test_dies": "failed", "test_after": "passed"} and found.lost == []
    plans = [line for line in (tmp_path / "out.jsonl").read_text().splitlines() if "planned" in line]
    assert len(plans) == 1 and len(json.loads(plans[0])["planned"]) == 7


@pytest.mark.skipif(find_spec("pytest_timeout") is None, reason="pytest-timeout is not installed")
def test_a_test_that_takes_too_long_is_ended(tmp_path):
    waits = "import time\ndef test_waits(): time.sleep(600)\n"
    found = run(tmp_path, waits, "--timeout", "1", "--timeout-method", "thread")
    assert len(found.lost) == 1 and found.running.endswith("test_waits")


def test_half_a_line_is_no_record(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = json.dumps({"stage": "here", "name": "one", "result": "passed"})
    path.write_text(f"{whole}\n{whole.replace('here', 'there')}\n{whole[:-5]}")
    assert records.tally(path, "here").results == {"one": "passed"}
    assert records.tally(tmp_path / "absent", "here").results == {}


def test_a_failure_stays_one():
    """A test that is reported twice."""
    assert records.operation_of("taylor_extrapolate_steps 2x3") == "taylor_extrapolate"
    assert records.operation_of("test_anything") is None


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(records.FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    records.write(name="one", result="passed")
    assert list(tmp_path.iterdir()) == []
