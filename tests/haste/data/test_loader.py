"""The order of batches, the processes that read them, and the files that cannot be read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess

import pytest
import torch
from accelerate import Accelerator
from haste.data import BatchOrder, Loader, batches, load_dataset
from haste.data.loader import warn_of_cores
from haste.errors import UserError
from haste.training.config import TrainConfig
from hypothesis import given
from hypothesis import strategies as st
from image_files import cut_short
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


@given(samples=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_image_once(samples, batch, seed):
    order = BatchOrder(samples, batch, seed)
    stream = torch.cat([order.batch(step) for step in range(3 * samples // batch + 1)])
    for epoch in range(len(stream) // samples):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))


def test_a_batch_depends_on_its_step_alone():
    order = BatchOrder(50, 16, seed=3)
    walked = [order.batch(step) for step in range(12)]
    for step in (11, 0, 5):
        assert torch.equal(BatchOrder(50, 16, seed=3).batch(step), walked[step])


def test_epochs_and_seeds_differ():
    order = BatchOrder(100, 100, seed=0)
    assert not torch.equal(order.batch(0), order.batch(1))
    assert not torch.equal(order.batch(0), BatchOrder(100, 100, seed=1).batch(0))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    BatchOrder(10, 4, seed=0).batch(7)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="num_samples is 0"):
        BatchOrder(0, 4, seed=0)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(x, y, strict=True))


@pytest.fixture
def data(class_folder):
    return load_dataset(str(class_folder), 8)


@pytest.fixture
def latents(repa_folder):
    return load_dataset(str(repa_folder), 16)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_the_images_of_the_order(data, num_workers):
    order = BatchOrder(12, 4, seed=0)
    for step, batch in enumerate(take(batches(data, order, num_workers=num_workers), 5)):
        samples = [data[index] for index in order.batch(step).tolist()]
        assert torch.equal(batch.condition, torch.stack([sample.label for sample in samples]))
        pixels = torch.stack([sample.pixels for sample in samples])
        assert torch.equal(((batch.inputs + 1) * 127.5).round().to(torch.uint8), pixels)
        assert batch.images is batch.inputs


def test_any_step_can_be_the_first_and_draws_what_it_would_have_drawn(latents):
    order = BatchOrder(len(latents), 4, seed=0)
    torch.manual_seed(1)
    stream = batches(latents, order)
    take(stream, 3)
    state = torch.get_rng_state()
    expected = take(stream, 2)
    torch.set_rng_state(state)
    assert_same(take(batches(latents, order, start_step=3, num_workers=2), 2), expected)


def test_reading_ahead_touches_no_random_numbers_of_the_trainer(data):
    before = torch.get_rng_state()
    take(batches(data, BatchOrder(12, 4, seed=0), num_workers=2), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_come_from_the_generator_that_is_given(latents):
    before = torch.get_rng_state()
    pair = [
        next(batches(latents, BatchOrder(6, 4, seed=0), generator=torch.Generator().manual_seed(7))) for _ in range(2)
    ]
    assert_same(pair[:1], pair[1:])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shares_of_several_processes_make_up_the_batch(data):
    order = BatchOrder(12, 6, seed=0)
    whole = take(batches(data, order), 4)
    shares = [take(batches(data, order, process_index=index, num_processes=3), 4) for index in range(3)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[step].inputs for share in shares]), batch.inputs)
        assert all(len(share[step].condition) == 2 for share in shares)


def test_a_batch_that_processes_cannot_share_is_refused(data):
    with pytest.raises(UserError, match="--batch-size must be a multiple of 4, the number of processes, got 6"):
        batches(data, BatchOrder(12, 6, seed=0), num_processes=4)


# ---- bad files ----


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_file_ends_the_run_with_one_line(class_folder, data, num_workers):
    cut_short(class_folder / "bee" / "04.png")
    with pytest.raises(UserError) as error:
        take(batches(data, BatchOrder(12, 4, seed=0), num_workers=num_workers), 3)
    message = str(error.value)
    assert message.startswith(f"{class_folder}/bee/04.png is damaged (")
    assert message.endswith("; replace it, or skip such files with --on-bad-file skip") and "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_files_are_named_and_counted_once_and_the_next_stands_in(class_folder, num_workers, caplog):
    data = load_dataset(str(class_folder), 8, on_bad_file="skip")
    cut_short(class_folder / "bee" / "04.png")
    (class_folder / "bee" / "07.png").unlink()
    order = BatchOrder(12, 12, seed=0)
    (batch, _) = take(batches(data, order, num_workers=num_workers), 2)
    place = order.batch(0).tolist()
    for bad in (5, 6):  # bee/04 and bee/07; bee/10 is the next
        assert torch.equal(batch.inputs[place.index(bad)], batch.inputs[place.index(7)])
    assert sorted(data.skipped) == [f"{class_folder}/bee/04.png", f"{class_folder}/bee/07.png"]
    first, second = (record.message for record in caplog.records)
    assert first.endswith("(1 so far)") and second.endswith("(2 so far)")


def test_where_nothing_is_left_skipping_ends(class_folder):
    data = load_dataset(str(class_folder), 8, on_bad_file="skip")
    for path in class_folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"--on-bad-file skip found no file .* is empty"):
        next(batches(data, BatchOrder(12, 4, seed=0)))


# ---- worker processes ----


def test_workers_outlive_the_signals_that_ask_the_trainer_to_save(data):
    stream = batches(data, BatchOrder(12, 4, seed=0), num_workers=2)
    next(stream)
    for worker in multiprocessing.active_children():
        for name in ("INT", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert_same(take(stream, 9), take(batches(data, BatchOrder(12, 4, seed=0), 1), 9))


def test_workers_end_at_the_parents_word_and_when_nobody_reads_any_more(data):
    stream = batches(data, BatchOrder(12, 4, seed=0), num_workers=2)
    next(stream)
    first, second = multiprocessing.active_children()
    first.terminate()
    first.join(timeout=30)
    assert first.exitcode == 0
    stream.close()
    assert not second.is_alive()


def test_a_worker_that_is_killed_is_told_in_one_line_by_the_next_read(data, monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # 5 s between two looks
    stream = batches(data, BatchOrder(12, 4, seed=0), num_workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(UserError, match="a worker process was killed: DataLoader worker"):
        take(stream, 50)


def test_data_in_memory_needs_no_workers():
    data = load_dataset("digits", 8)
    stream = batches(data, BatchOrder(len(data), 32, seed=0), num_workers=4)
    batch = next(stream)
    assert multiprocessing.active_children() == []
    indices = BatchOrder(len(data), 32, seed=0).batch(0)
    assert torch.equal(batch.condition, data._labels[indices]) and torch.equal(batch.inputs, data._images[indices])


def test_there_are_no_more_workers_than_images(class_folder, monkeypatch):
    started = []
    monkeypatch.setattr("haste.data.loader._deliver", lambda data, loader, *_: started.append(loader.num_workers))
    data = load_dataset(str(class_folder), 8)
    for asked in (len(data) - 1, 1024):
        batches(data, BatchOrder(len(data), 4, seed=0), num_workers=asked)
    assert started == [len(data) - 1, len(data)]


def test_more_workers_than_cores_are_told_once(class_folder, monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    warn_of_cores.cache_clear()
    data = load_dataset(str(class_folder), 8)
    for _ in range(2):
        batches(data, BatchOrder(len(data), 4, seed=0), num_workers=3)
    assert caplog.text.count("--num-workers 3 exceeds the 1 cores") == 1
    warn_of_cores.cache_clear()


# ---- the loader of a run ----


@pytest.fixture
def make_loader(class_folder, vae_folder):
    def make(start=0, images=True, **changes):
        config = TrainConfig(**{"batch_size": 4, "num_workers": 0, "gradient_accumulation_steps": 2, **changes})
        data = load_dataset(str(class_folder), 16, vae=str(vae_folder))
        return Loader(data, config, Accelerator(cpu=True), start, images)

    return make


def test_a_loader_that_begins_later_gives_the_same(make_loader):
    whole, later = make_loader(), make_loader(start=1)
    steps = list(itertools.product((0, 1, 2), (0, 1)))
    batches = {place: whole.next(*place) for place in steps}
    torch.rand(100)  # the run's own numbers are of no account
    for place in steps[2:]:
        batch = later.next(*place)
        for a, b in zip(batch, batches[place], strict=True):
            assert torch.equal(a, b)
    first, again = batches[0, 0], make_loader(seed=1).next(0, 0)
    assert not torch.equal(first.inputs, again.inputs)


def test_a_probe_sees_the_same_images_every_time_and_leaves_the_run_alone(make_loader):
    loader, other = make_loader(probe_images=5), make_loader()
    first = [batch.inputs for batch in loader.probe()]
    assert [len(inputs) for inputs in first] == [2, 2]
    assert torch.equal(loader.next(0, 0).inputs, other.next(0, 0).inputs)
    again = [batch.inputs for batch in loader.probe()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(loader.next(0, 1).inputs, other.next(0, 1).inputs)
