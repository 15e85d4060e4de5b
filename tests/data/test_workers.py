"""workers.py: batches do not depend on the processes; those that die or fall silent end the pass in one line."""

import errno
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from data_sets import FOR_TREES, batches, same, truncate
from preprocess import WorkerError, load
from sasa.data import images, workers
from sasa.data.images import Files, ImageFiles, Key

ROOT = Path(__file__).resolve().parents[2]


def test_workers_change_nothing(tree):
    truncate(tree / "train" / "cat" / "04.jpg")
    loaded = [
        load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=count, skip_bad_images=True) for count in (0, 2)
    ]
    (_, alone, _, alone_test), (_, shared, _, shared_test) = loaded
    for epoch in (0, 1):
        assert same(*(batches(t, epoch, batch_size=6, augment=FOR_TREES) for t in (alone, shared)))
    for _ in shared.batches(2, batch_size=6, seed=5):  # an epoch left in the middle does not leak into the next
        break
    assert same(*(batches(t, 3, 1, batch_size=6, augment=FOR_TREES) for t in (alone, shared)))
    assert same(list(alone_test.eval_batches(4)), list(shared_test.eval_batches(4)))
    assert alone.bad_images == shared.bad_images and len(alone.bad_images) == 1


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(
    ("shortage", "words"),
    [(OSError(errno.EMFILE, "Too many open files"), "Too many open files"), (MemoryError(), "out of memory")],
    ids=["files", "memory"],
)
def test_a_shortage_of_the_system_is_no_bad_image(tree, monkeypatch, count, shortage, words):
    """Skipped, it would cost images that are whole, more or fewer as the machine is busy."""

    def decode(file):
        raise shortage

    monkeypatch.setattr(images, "decode", decode)
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=count, skip_bad_images=True)
    with pytest.raises(WorkerError, match=rf"^\S*train/\w+/\d+\.jpg: {words}$"):
        batches(train)
    assert train.bad_images == []


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_workers_ignore_the_launchers_signals(tree):
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=1)
    epoch = train.batches(0, batch_size=2, seed=5)
    first = next(epoch)
    (worker,) = train._reader.workers._loader._iterator._workers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert same([first, *epoch], batches(load(dataset="FOLDER", data_dir=tree, img_size=16)[1], batch_size=2))
    assert worker.is_alive()


def test_workers_that_ignore_signals_do_not_keep_the_process(tree):
    """An error in the middle of an epoch, with the workers still at work and something still holding on to them."""
    code = f"""
import preprocess
_, train, _, _ = preprocess.load(dataset="FOLDER", data_dir={str(tree)!r}, img_size=16, num_workers=2)
epoch = train.batches(0, batch_size=2)
next(epoch)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 3


class Odd(ImageFiles):
    """Images whose reading misbehaves in a worker at one place of the list."""

    def __init__(self, files, at, how):
        super().__init__(files, [0] * len(files), 16, False)
        self.at, self.how = at, how

    def __getitem__(self, key):
        if key.index == self.at:
            self.how()
        return super().__getitem__(key)


def read_odd(tree, how, at=9, **options):
    paths = [str(path) for path in sorted(tree.glob("train/cat/*.jpg"))]
    reader = workers.Reader(Odd(Files(paths), at, how), torch.device("cpu"), 2, **options)
    return reader, reader.read(iter([[Key(i, None)] for i in range(len(paths))]))


@pytest.fixture
def fast(monkeypatch):
    """Polls three times a second instead of every ten seconds."""
    monkeypatch.setattr(workers, "_POLL_S", 0.3)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", [die, functools.partial(os._exit, 3)])
def test_a_worker_that_dies_is_one_line_and_no_exception_elsewhere(tree, how, fast):
    handler = signal.getsignal(signal.SIGCHLD)
    reader, epoch = read_odd(tree, how)
    for _ in range(6):  # after which the tenth batch is given to a worker
        next(epoch)
    assert signal.getsignal(signal.SIGCHLD) == handler
    time.sleep(0.3)  # the training step in which the worker dies
    words = r"was killed by SIGKILL.*memory.*--num-workers" if how is die else "ended by itself, exit code 3"
    with pytest.raises(WorkerError, match=words) as error:
        list(epoch)
    assert "\n" not in str(error.value) and "a restart can help" in str(error.value)
    assert not any(worker.is_alive() for worker in reader.workers._loader._iterator._workers)


def test_a_silent_worker_is_named_and_then_ends_the_pass(tree, fast, monkeypatch, capfd):
    monkeypatch.setattr(workers, "NAMED_AFTER_S", 1.0)
    monkeypatch.setattr(workers, "_KILL_AFTER_S", 0.2)
    reader, epoch = read_odd(tree, functools.partial(time.sleep, 60), timeout_s=3)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"silent for \d s; .*cat/09\.jpg: the limit is --worker-timeout 3"):
        list(epoch)
    assert 3 <= time.monotonic() - begin < 30
    lines = [line for line in capfd.readouterr().err.splitlines() if "silent" in line]
    assert len(lines) == 1 and "cat/09.jpg; ends the run after 3 s (--worker-timeout)" in lines[0]
    assert not any(worker.is_alive() for worker in reader.workers._loader._iterator._workers)


def test_a_run_that_was_asked_to_stop_waits_no_longer_for_a_silent_worker(tree, fast, monkeypatch):
    monkeypatch.setattr(workers, "_KILL_AFTER_S", 0.2)
    stopped = []
    reader, epoch = read_odd(tree, functools.partial(time.sleep, 60), timeout_s=0, is_stopped=lambda: bool(stopped))
    for _ in range(9):
        next(epoch)
    stopped.append(True)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match="alive but silent"):
        next(epoch)
    assert time.monotonic() - begin < 20
    reader.close()


def test_a_slow_worker_is_waited_for(tree, fast):
    _, epoch = read_odd(tree, functools.partial(time.sleep, 1), timeout_s=30)
    assert len(list(epoch)) == 11


def test_a_batch_that_cannot_be_handed_over_is_one_line(tree, monkeypatch):
    """As a full /dev/shm or a TMPDIR too long for a socket's name: whatever pickling in the worker raises."""

    dumps = workers.ForkingPickler.dumps

    def full(what, *rest):
        if isinstance(what, tuple) and torch.is_tensor(what[0]):
            raise OSError(28, "No space left on device")
        return dumps(what, *rest)

    monkeypatch.setattr(workers.ForkingPickler, "dumps", full)
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=1)
    with pytest.raises(WorkerError, match=r"cannot hand over a batch .*No space left.*--num-workers 0"):
        batches(train, batch_size=4)


def test_a_tmpdir_too_long_for_sockets_is_one_line(tree, monkeypatch):
    """The processes, which are forked, make their sockets there; where torch needs none, the batches come."""
    folder = tree / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    _, train, _, _ = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=2)
    try:
        assert len(batches(train, batch_size=4)) == 5
    except WorkerError as error:
        assert "cannot hand over a batch" in str(error) and "TMPDIR" in str(error) and "\n" not in str(error)
    train.close()


def test_a_pass_left_in_the_middle_leaves_nothing_behind(tree):
    _, train, _, test = load(dataset="FOLDER", data_dir=tree, img_size=16, num_workers=2)
    whole = batches(train, batch_size=2)
    for taken in (0, 1, 5):
        left = train.batches(0, batch_size=2, seed=5)
        for _ in range(taken):
            next(left)
        assert same(batches(train, batch_size=2), whole)
    assert sum(len(labels) for _, labels in test.eval_batches(4)) == 14
