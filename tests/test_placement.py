"""Placements give identical batches; `stream` reads ahead within bounds, checks what it reads, and leaves nothing."""

import copy
import gc
import mmap
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar import ArrayStore, Augment, Loader, memory, placement, streaming
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.errors import ConfigError, DataError
from fastcifar.kernels.eager import EagerAugment
from fastcifar.staging import Staged
from fastcifar.streaming import Reader

CPU = torch.device("cpu")
AUGMENT = Augment(crop=2, padding="reflect", flip="random", cutout=3)


def write(path: Path, count: int, side: int = 8, seed: int = 0) -> ArrayStore:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, side, side, 3), np.uint8)
    files = [SourceFile("a", images, generator.integers(0, 10, count))]
    splits = {"full": {"train": ["a"]}}
    write_store(path, files, name="s", classes=[str(i) for i in range(10)], splits=splits, source={})
    return ArrayStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArrayStore:
    return write(tmp_path_factory.mktemp("placement") / "store", 203)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ArrayStore:
    """Three chunks of 4 MiB."""
    return write(tmp_path_factory.mktemp("placement") / "large", 3500, side=32)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", ["random", "block", "sequential"])
@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("split", ["train", "holdout/train"])
def test_placements_give_identical_batches(store: ArrayStore, order: Any, backend: Any, split: str) -> None:
    options: Any = {"batch_size": 20, "augment": AUGMENT, "order": order, "block_size": 7, "window": 3, "split": split}
    expected = list(Loader(store, placement="device", **options))
    for place in ("stream", "host", "auto"):
        loader = Loader(store, placement=place, backend=backend, **options)
        assert all(same(a, b) for a, b in zip(loader, expected, strict=True))
        assert same(loader.batch(0, 3), expected[3])  # and in any order


@pytest.mark.parametrize("placed", ["device", "stream"])
def test_a_state_holds_across_placements(store: ArrayStore, placed: Any) -> None:
    options: Any = {"batch_size": 20, "augment": AUGMENT}
    first = Loader(store, placement="stream", **options)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    second = Loader(store, placement=placed, **options)
    second.load_state_dict(first.state_dict())
    assert same(next(iter(second)), first.batch(0, 3))


@pytest.mark.parametrize("capacity", [None, 40])
def test_batches_gathered_by_the_host_are_the_same(store: ArrayStore, capacity: int | None) -> None:
    loader = Loader(store, batch_size=32, augment=AUGMENT)
    plan = loader._plan
    staged = Staged(store.images, store.labels, plan, EagerAugment(store.image_shape, plan, CPU), CPU)
    for ahead in (False, True):
        for step in range(6):
            where = {"epoch": 1, "start": 32 * step, "size": 32}
            if ahead:
                staged.prepare(**where)
            images, labels = staged(**where, capacity=capacity)
            assert same((images[:32], labels[:32]), loader.batch(1, step))
            assert capacity is None or len(labels) == 40
    staged.prepare(epoch=0, start=0, size=5)
    staged.forget()
    assert not staged._ahead
    with pytest.raises(ValueError, match="not within"):
        staged(epoch=0, start=200, size=20)


def test_breaking_off_leaves_no_thread(store: ArrayStore) -> None:
    before = set(threading.enumerate())
    loader = Loader(store, batch_size=10, placement="stream")
    for _ in range(5):
        for _ in loader:
            break
    with pytest.raises(KeyError):
        for _ in loader:
            raise KeyError("the user's own")
    iterator = iter(loader)
    next(iterator)
    del iterator
    other = Loader(store, batch_size=10, placement="stream")
    other.batch(0, 3)  # a batch alone ends nothing
    gone = weakref.ref(other._pipeline)
    del other
    gc.collect()
    assert gone() is None
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("fastcifar-kernel"):  # those end with the last kernel
            thread.join(10)
            assert not thread.is_alive()


def test_the_end_of_a_pass_disturbs_no_other_thread(store: ArrayStore) -> None:
    """Its reader is closed then, while others wait for what it reads."""
    loader = Loader(store, batch_size=10, placement="stream")
    expected = [Loader(store, batch_size=10).batch(0, step) for step in range(len(loader))]
    failed: list[BaseException] = []

    def passes() -> None:
        for _ in range(100):
            for _ in loader:
                break

    def batches() -> None:
        for call in range(100):
            step = call % len(loader)
            assert same(loader.batch(0, step), expected[step])

    def caught(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=caught, args=(work,), daemon=True) for work in (passes, batches, batches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)


def test_a_reader_that_is_closed_while_it_begins_goes_on(large: ArrayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the garbage collector ends a dropped pass: in the same thread, at any instant."""
    plan = Loader(large, batch_size=100, order="block", block_size=50, window=10)._plan
    reader, closed = Reader(large, plan), []
    submit = streaming._Thread.submit

    def interrupted(thread: Any, epoch: int, span: int) -> Any:
        if len(closed) < 3:
            closed.append(span)
            reader.close()
        future = submit(thread, epoch, span)
        if len(closed) < 5:
            closed.append(span)
            reader.close()
        return future

    monkeypatch.setattr(streaming._Thread, "submit", interrupted)
    reader.prepare(epoch=0, start=0, size=100)
    assert len(closed) == 5
    reader.close()


def test_without_a_thread_to_be_had_it_is_read_in_the_callers(
    store: ArrayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    expected = Loader(store, batch_size=10, backend="eager").batch(0, 3)
    monkeypatch.setattr(threading.Thread, "start", none)
    ArrayStore(store.path, verify=True)
    loader = Loader(ArrayStore(store.path), batch_size=10, backend="eager", placement="stream")
    assert same(loader.batch(0, 3), expected)


@pytest.mark.parametrize("augment", [AUGMENT, Augment(policy="trivial"), Augment(policy="trivial", policy_epochs=1)])
def test_nothing_is_copied_ahead_that_the_reader_has_not_checked(
    store: ArrayStore, augment: Augment, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: set[tuple[int, int]] = set()
    prepare, begin = Reader.prepare, Staged._begin

    def damaged(self: Reader, *, epoch: int, start: int, size: int) -> None:
        if (epoch, start) == (1, 100):
            raise DataError("bytes do not have their checksum")
        prepare(self, epoch=epoch, start=start, size=size)
        checked.add((epoch, start))

    def copied(self: Staged, epoch: int, start: int, size: int) -> Any:
        assert (epoch, start) in checked
        return begin(self, epoch, start, size)

    monkeypatch.setattr(Reader, "prepare", damaged)
    monkeypatch.setattr(Staged, "_begin", copied)
    loader = Loader(store, batch_size=20, backend="eager", placement="stream", augment=augment)
    assert len(list(loader)) == 11
    batches = iter(loader)
    assert len([next(batches) for _ in range(5)]) == 5  # those before the damage are given
    with pytest.raises(DataError, match="checksum"):
        next(batches)


def test_files_are_closed_with_the_last_user(store: ArrayStore, tmp_path: Path) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    before = open_files()
    loader = Loader(copy, batch_size=10, placement="stream")
    next(iter(loader))
    del loader
    assert open_files() == before
    assert str(copy) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("order", ["random", "block"])
def test_a_damaged_chunk_is_found_when_it_is_read(large: ArrayStore, tmp_path: Path, order: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(large.path, copy)
    with open(copy / "images.npy", "r+b") as handle:
        handle.seek(2 * 4 * 1024 * 1024 + 100)
        handle.write(b"\0\1\2\3")
    with pytest.raises(DataError, match="bytes 8388608 to 12582912 do not have their checksum"):
        for _ in Loader(copy, batch_size=100, placement="stream", order=order):
            pass


def test_a_batch_across_two_spans_waits_for_both(large: ArrayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Loader(large, batch_size=70, order="block", block_size=50, window=10)._plan  # 500 positions a span
    reader, read = Reader(large, plan), []
    real = reader._read

    def slow(epoch: int, span: int) -> None:
        time.sleep(0.1)
        real(epoch, span)
        read.append((epoch, span))

    monkeypatch.setattr(reader, "_read", slow)
    reader.prepare(epoch=0, start=490, size=70)
    assert {(0, 0), (0, 1)} <= set(read)
    reader.close()


def test_each_chunk_is_checked_once(large: ArrayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastcifar.data.store as module

    store, hashed = ArrayStore(large.path), []
    real = module.xxhash.xxh3_64_hexdigest
    monkeypatch.setattr(module.xxhash, "xxh3_64_hexdigest", lambda x: hashed.append(len(x)) or real(x))
    loader = Loader(store, batch_size=100, placement="stream")
    for _ in range(3):
        for _ in loader:
            pass
    assert sorted(hashed) == sorted([4 * 1024 * 1024] * 2 + [3500 * 3072 + 128 - 2 * 4 * 1024 * 1024])


def test_the_next_span_is_read_ahead_and_the_last_let_go(large: ArrayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Loader(large, batch_size=100, order="block", block_size=50, window=10)._plan  # 500 positions a span
    reader, read, dropped = Reader(large, plan), [], []
    real_read, real_drop = reader._read, reader._let_go
    monkeypatch.setattr(reader, "_read", lambda e, s: (read.append((e, s)), real_read(e, s))[0])
    monkeypatch.setattr(reader, "_let_go", lambda: (dropped.append(len(read)), real_drop())[0])
    for step in range(35):
        reader.prepare(epoch=0, start=100 * step, size=100)
    for span in reader._spans.values():
        span.result()  # closing takes back what has not begun
    reader.close()
    assert read == [(0, s) for s in range(7)] + [(1, 0)]  # each once, in order, and the next epoch's first
    assert len(dropped) == 8  # at each change, and at the end


def test_a_reader_works_in_a_forked_child(store: ArrayStore) -> None:
    code = f"""
import os, torch
from fastcifar import Loader
loader = Loader({str(store.path)!r}, batch_size=20, placement="stream")
expected = loader.batch(0, 5).images.sum()
iterator = iter(loader); next(iterator)
child = os.fork()
if child == 0:
    os._exit(0 if loader.batch(0, 5).images.sum() == expected else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="needs madvise")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_resident_memory_is_bounded(tmp_path: Path) -> None:
    """96 MiB streamed through spans of 6 MiB in 16 pieces, around which the system maps up to 2 MiB each."""
    store = write(tmp_path / "s", 32768, side=32)
    loader = Loader(store, batch_size=512, placement="stream", order="block", block_size=256, window=8)

    def mapped() -> int:
        entry = Path("/proc/self/smaps").read_text().partition(str(store.path / "images.npy"))[2]
        return int(entry.partition("Rss:")[2].split()[0]) * 1024

    most = 0
    for _ in range(2):
        for _ in loader:
            most = max(most, mapped())
    assert most < 48 * 2**20
    assert mapped() < 2**20


class Memory:
    """Stands for `free_memory`."""

    def __init__(self, **free: int | None) -> None:
        self.free = free

    def __call__(self, device: torch.device) -> int | None:
        return self.free[device.type]


@pytest.mark.parametrize(
    ("device", "free", "expected", "reason"),
    [
        ("cpu", {"cpu": 10**9}, "device", "of 1,000 MB of free memory on cpu"),
        ("cpu", {"cpu": 10**4}, "stream", "are more than 60% of the 0 MB that are free on cpu"),
        ("cpu", {"cpu": None}, "device", "of unknown free memory on cpu"),
        ("meta", {"meta": 10**9, "cpu": 10**9}, "device", "of 1,000 MB of free memory on meta"),
        ("meta", {"meta": 10**4, "cpu": 10**9}, "host", "are more than 60% of the 0 MB that are free on meta"),
        ("meta", {"meta": 10**4, "cpu": 10**4}, "stream", "free on cpu"),
        (
            "meta",
            {"meta": 10**9, "cpu": 10**4},
            "stream",
            "stream; 0 MB are more than 60% of the 0 MB that are free on cpu",
        ),
        ("meta", {"meta": None, "cpu": 10**9}, "device", "of unknown free memory on meta"),
    ],
)
def test_auto_chooses_by_what_fits_and_says_why(
    store: ArrayStore, monkeypatch: pytest.MonkeyPatch, device: str, free: Any, expected: str, reason: str
) -> None:
    gc.collect()
    monkeypatch.setattr(placement, "free_memory", Memory(**free))
    chosen, why = placement.choose_placement("auto", store, torch.device(device))
    assert chosen == expected
    assert reason in why
    assert why.startswith(f"{expected}: " if expected != "stream" else "stream; ")
    for asked in ("device", "stream"):
        assert placement.choose_placement(asked, store, torch.device(device))[0] == asked  # type: ignore[arg-type]


def test_a_loader_says_which_placement_and_why(store: ArrayStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastcifar")
    loader = Loader(store)
    assert loader.placement == "device"
    assert loader.placement_reason.startswith("device: ")
    assert loader.placement_reason in caplog.text
    assert Loader(store, placement="host").placement == "device"


def test_free_memory_of_this_machine() -> None:
    free = memory.free_memory(CPU)
    assert free is None or 0 <= free < 2**60
    if sys.platform == "linux":
        assert free


def test_free_memory_within_a_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   4096 kB\n",
        "sys/fs/cgroup/a/memory.max": "3000000\n",
        "sys/fs/cgroup/a/memory.current": "2000000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 500000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1000\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert memory.free_memory(CPU) == 1_500_000
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("max\n")
    assert memory.free_memory(CPU) == 4096 * 1024
    (tmp_path / "proc/self/cgroup").write_text("4:cpu:/x\n7:memory:/c\n")
    (tmp_path / "sys/fs/cgroup/memory/c").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/c/memory.limit_in_bytes").write_text("900000\n")
    (tmp_path / "sys/fs/cgroup/memory/c/memory.usage_in_bytes").write_text("1000000\n")
    assert memory.free_memory(CPU) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    code = """
import resource, sys, torch
from fastcifar.memory import keep_freed
assert sys.argv[1] == "no" or keep_freed()
faults = []
for turn in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (16, 40, 25):
        torch.zeros(size << 20, dtype=torch.uint8) + 1
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # the heap grows by a little now and then
"""
    faults = {
        word: int(subprocess.run([sys.executable, "-c", code, word], capture_output=True, check=True).stdout)
        for word in ("no", "yes")
    }
    assert faults["no"] > 1_000
    assert faults["yes"] < faults["no"] / 20


@pytest.mark.parametrize("option", [{"block_size": 0}, {"window": 2**31}])
def test_a_wrong_block_is_refused(store: ArrayStore, option: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        Loader(store, order="block", **option)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
@pytest.mark.parametrize("where", ["device", "stream"])
@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
def test_a_copy_stands_where_the_loader_does(
    store: ArrayStore, backend: Any, where: Any, copied: Callable[[Loader], Loader]
) -> None:
    loader = Loader(store, batch_size=30, seed=5, augment=AUGMENT, backend=backend, placement=where)
    batches = iter(loader)
    next(batches)
    other = copied(loader)
    assert other.state_dict() == loader.state_dict()
    assert other.placement == where
    position = torch.tensor([0, 2])
    del loader.store  # the copy's operator is not this one's
    assert same(other.batch_at(position), other.batch(0, 2))
    assert same(other.batch(1, 1), Loader(store, batch_size=30, seed=5, augment=AUGMENT).batch(1, 1))
