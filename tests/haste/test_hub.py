import time

import pytest
from haste import weights
from haste.errors import UserError


@pytest.fixture(autouse=True)
def forgotten():
    weights.is_reachable.cache_clear()
    yield
    weights.is_reachable.cache_clear()


def answer(monkeypatch, head):
    class Session:
        pass

    Session.head = staticmethod(head)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)


def refuse(*arguments, **options):
    raise OSError("no network")


def test_one_attempt_tells_and_is_remembered(monkeypatch):
    asked = []
    answer(monkeypatch, lambda url, timeout: asked.append((url, timeout)))
    assert weights.is_reachable() and weights.is_reachable()
    assert len(asked) == 1 and asked[0][1] == weights.PATIENCE <= 2


def test_an_error_and_silence_are_no_answer(monkeypatch):
    answer(monkeypatch, refuse)
    assert not weights.is_reachable()
    weights.is_reachable.cache_clear()
    monkeypatch.setattr(weights, "PATIENCE", 0.01)
    answer(monkeypatch, lambda url, timeout: time.sleep(5))
    assert not weights.is_reachable()


def test_what_cannot_be_had_is_refused_by_flag_and_the_rest_is_looked_for_at_home(monkeypatch, tmp_path):
    answer(monkeypatch, refuse)
    with pytest.raises(UserError, match="--enc-type must be .* the hub cannot be reached .* got somebody/none"):
        weights.require_source("somebody/none", "somebody/none", "--enc-type")
    weights.require_source("x", str(tmp_path), "--enc-type")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, name: f"/cache/{source}/{name}")
    weights.require_source("somebody/known", "somebody/known", "--enc-type")
    assert weights.loading_arguments("somebody/known") == {"local_files_only": True}
    weights.is_reachable.cache_clear()
    answer(monkeypatch, lambda url, timeout: None)
    assert weights.loading_arguments("somebody/known") == {"local_files_only": False}
    assert weights.loading_arguments(str(tmp_path)) == {"local_files_only": True}
