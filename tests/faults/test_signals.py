"""SIGINT, SIGTERM and SIGHUP at any moment of a command's life: it ends soon, in one line, and nothing is lost."""

import contextlib
import gc
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar import checkpoint, signals
from fastcifar.commands import train as train_command
from fastcifar.data.store import ArrayStore
from fastcifar.engine import fit
from fastcifar.errors import StoppedError
from fastcifar.trainer import Trainer
from tests.cifar_files import tiny_cifar10
from tests.effort import effort
from tests.faults import tiny_runs
from tests.faults.forked import Forked
from tests.faults.steps import steps

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs fork and /proc")

ARCHIVE = Path("tiny.tar.gz")
SOON = 10.0  # seconds that a system grants between SIGTERM and SIGKILL, at the least
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), signals.catch_stop() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_can_be_asked_for_by_any_thread_and_only_once() -> None:
    with signals.catch_stop() as stop:
        for _ in range(2):  # the second must not count as a second signal
            thread = threading.Thread(target=signals.request_stop)
            thread.start()
            thread.join()
        assert stop.signum == signal.SIGTERM


def test_what_a_part_was_asked_the_whole_knows_and_so_do_the_parts_to_come() -> None:
    with signals.catch_stop() as outer:
        with signals.catch_stop() as first:
            assert first.signum is None
            os.kill(os.getpid(), signal.SIGINT)
            assert (outer.signum, first.signum) == (None, signal.SIGINT)
        assert outer.signum == signal.SIGINT
        with signals.catch_stop() as second:
            assert second.signum == signal.SIGINT
        with pytest.raises(StoppedError), signals.stop_at_once("before it began"):
            raise AssertionError
    with signals.catch_stop() as later:
        assert later.signum is None


def test_another_thread_installs_no_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with signals.catch_stop() as stop:
            seen.append((stop.signum, signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, True)]


@pytest.mark.parametrize("number", STATUS)
def test_where_nothing_can_be_saved_the_first_signal_is_an_error(number: signal.Signals) -> None:
    expected = pytest.raises(StoppedError, match=f"^stopped by {number.name} in the middle$")
    with expected as caught, signals.stop_at_once("in the middle"):
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert caught.value.exit_status == STATUS[number]


def test_a_signal_that_is_lost_on_its_way_is_found_at_the_end() -> None:
    lost = contextlib.suppress(BaseException)  # as where a callback meets it
    with pytest.raises(StoppedError, match="stopped by SIGTERM at last"), signals.stop_at_once("at last"), lost:
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped by SIGINT at last"), signals.stop_at_once("at last"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("made of it by whoever was imported") from None
    with pytest.raises(ImportError), signals.stop_at_once("not at all"):
        raise ImportError


def test_an_ignored_sighup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.catch_stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_at_any_instruction_is_heard_by_someone_and_raises_nothing_raw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def at(moment: int) -> tuple[int, str]:
        """The instructions that there are, and who heard of a signal before number `moment` of them."""
        count, outside, done = 0, [], []
        before = signal.signal(signal.SIGTERM, lambda heard, frame: outside.append(heard))

        def block() -> None:
            with signals.catch_stop() as stop:
                done.append(stop)
                with stop.at_once("in the middle"):
                    done.append(stop)
                done.append(stop)

        def trace(frame: FrameType, event: str, value: object) -> Any:
            nonlocal count
            frame.f_trace_opcodes = True
            count += event == "opcode"
            if event == "opcode" and count == moment:
                sys.settrace(None)
                signal.raise_signal(signal.SIGTERM)
            return trace

        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            block()
        except StoppedError as error:
            return count, f"at once: {error}, status {error.exit_status}, {'all' if len(done) == 3 else 'not all'} done"
        finally:
            sys.settrace(tracing)
            signal.signal(signal.SIGTERM, before)
        return count, "outside" if outside else "asked" if done[0].signum == signal.SIGTERM else "nobody"

    gc.collect()
    gc.disable()  # or the finalizers of other tests' objects would be counted among the instructions
    try:
        count, heard = at(0)
        assert (count > 500, heard) == (True, "nobody")
        all_heard = {at(moment)[1] for moment in range(1, count + 1)}
    finally:
        gc.enable()
    assert all_heard == {
        "outside",
        "asked",
        "at once: stopped by SIGTERM in the middle, status 143, not all done",
    }
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", STATUS)
def test_the_exit_status_stays_while_python_takes_itself_apart(number: signal.Signals) -> None:
    code = f"""
import os
from fastcifar import signals
class Late:
    def __del__(self, kill=os.kill, own=os.getpid()):
        kill(own, {int(number)})
late = Late()
signals.leave_on_stop(print)
signals.end_with(0, lambda: None)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_as_a_command_says_why_it_ends_adds_no_line(number: signal.Signals) -> None:
    code = f"""
import os, sys
from fastcifar import commands
class Error:
    def write(self, text, kill=os.kill, real=sys.stderr.write):
        kill(os.getpid(), {int(number)})
        real(text)
        kill(os.getpid(), {int(number)})
    def flush(self):
        pass
sys.stderr = Error()
commands.entry("nonsense")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("fastcifar: unknown command 'nonsense'")


def command(run: str, **options: str) -> list[str]:
    """Train for some tenths of a second, from an archive that is to be converted first."""
    given = {"arch": "tiny", "split": "full", "epochs": "2", "batch_size": "16", "device": "cpu", "out": run}
    given |= {"dataset": "cifar10", "data": str(ARCHIVE)} | options
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    return ["train", "--allow-unverified", *(text for pair in pairs for text in pair)]


@contextlib.contextmanager
def ended_by(number: signal.Signals) -> Iterator[None]:
    """Send a signal when all is done but the leaving."""
    real = train_command.forgive_output

    def last() -> None:
        os.kill(os.getpid(), number)
        real()

    train_command.forgive_output = last
    yield


Place = tuple[dict[str, torch.Tensor], float]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, torch.Tensor], float]]:
    """A folder with the archive, the tensors that an undisturbed run leaves, and its seconds."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.prepare(patch, folder)
        tiny_cifar10(ARCHIVE, per_file=12)
        patch.setenv("FASTCIFAR_HOME", "home")
        with tiny_runs.one_thread():  # imports and compiles here, so that no child has to
            fit(tiny_runs.config("first", split="full", dataset="cifar10", data=ARCHIVE, allow_unverified=True))
        patch.setenv("FASTCIFAR_HOME", "home-undisturbed")
        done = Forked(*command("undisturbed"))
        assert done.wait() == 0, done.stderr
        yield folder, tiny_runs.weights(Path("undisturbed")), time.monotonic() - done.started


@pytest.fixture
def undisturbed(
    prepared: tuple[Path, dict[str, torch.Tensor], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    """In a new folder with the archive: the tensors that an undisturbed run leaves, and its seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCIFAR_HOME", "home")
    os.link(prepared[0] / ARCHIVE, ARCHIVE)
    return prepared[1:]


def goes_on(ended: Forked, status: int, run: str, number: signal.Signals, expected: dict[str, torch.Tensor]) -> str:
    """Check what a stopped run says and leaves, and go on with it to the end; in a word, when it was stopped."""
    error, folder = ended.stderr, Path(run)
    assert status in (0, STATUS[number]), (status, error)
    assert error.count("\n") == (status != 0), error
    home_of_run = Path(os.environ["FASTCIFAR_HOME"])
    assert not [path for place in (folder, home_of_run) for path in place.rglob(".tmp-*")]
    for line in (folder / "metrics.jsonl").read_bytes().splitlines() if (folder / "checkpoints").exists() else ():
        json.loads(line)
    if status == 0 or error == f"fastcifar: stopped by {number.name} at its end; what it wrote is whole\n":
        when = "done"
    elif error == f"fastcifar: stopped by {number.name} before training began; nothing was saved\n" or error == (
        f"fastcifar: stopped by {number.name}; nothing was changed\n"
    ):
        when = "before"
        assert not folder.exists()
        again = Forked(*command(run))
        assert again.wait() == 0, again.stderr
    else:
        when = "saved"
        assert f"stopped by {number.name} after step " in error
        assert error.endswith(f", saved; go on with: fastcifar train --resume {run}\n")
        again = Forked("train", "--resume", run)
        assert again.wait() == 0, again.stderr
    assert tiny_runs.equal(tiny_runs.weights(folder), expected)
    return when


def test_signals_at_random_moments(undisturbed: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, seconds = undisturbed
    seen: set[str] = set()
    count, draw = effort(5), random.Random(0)
    for moment in range(4 * count):
        if moment >= count and seen >= {"before", "saved"}:
            break
        number, run = list(STATUS)[moment % 3], f"run-{moment}"
        monkeypatch.setenv("FASTCIFAR_HOME", f"home-{moment}")
        running = Forked(*command(run))
        time.sleep(seconds * (moment % count + draw.random()) / count)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, number)
        try:
            status = running.wait(SOON)
        except AssertionError:
            raise AssertionError(f"a hang after moment {moment}: {running.stdout}{running.stderr}") from None
        if status == -number:  # a fork takes a moment until it listens, as the interpreter does
            assert moment % count == 0
            continue
        seen.add(goes_on(running, status, run, number, expected))
        if status == 0:  # a shared machine is now faster than it was
            seconds *= 0.8
    assert seen >= {"before", "saved"}


def test_a_signal_when_all_is_written_says_so(undisturbed: Place) -> None:
    running = Forked(*command("run"), within=lambda: ended_by(signal.SIGTERM))
    assert running.wait() == 143
    assert goes_on(running, 143, "run", signal.SIGTERM, undisturbed[0]) == "done"


def signalled(folder: str, number: int, signum: signal.Signals, names: str) -> Iterator[None]:
    """Send the process a signal before step `number` that changes a file, and write down all of them."""
    left, seen = number, []

    def before(kind: str, path: Path) -> None:
        nonlocal left
        left -= 1
        seen.append(f"{kind} {path}")
        if left == 0:
            os.kill(os.getpid(), signum)

    with steps(Path(folder), before):
        try:
            yield
        finally:
            os.write(os.open(names, os.O_WRONLY | os.O_CREAT), "\n".join(seen).encode())


def test_signals_before_files_are_changed(undisturbed: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = undisturbed

    def run_until(moment: int, signum: signal.Signals) -> Forked:
        name = f"{moment}"
        Path(name).mkdir()
        monkeypatch.setenv("FASTCIFAR_HOME", f"{name}/home")

        @contextlib.contextmanager
        def within() -> Iterator[None]:
            yield from signalled(name, moment, signum, f"seen-{name}")

        return Forked(*command(f"{name}/run"), within=within)

    assert run_until(0, signal.SIGTERM).wait() == 0
    places = Path("seen-0").read_text().splitlines()
    assert len(places) > 100
    # one in the store, the run's folder, a checkpoint, a picture, the page; then at random
    kinds = ("stores/", "config.json", "00000003", "00000006", "loss.png", "report.html")
    chosen = [next(number for number, place in enumerate(places, 1) if kind in place) for kind in kinds]
    chosen += random.Random(0).sample(range(1, len(places) + 1), min(effort(1), len(places)))
    seen: set[str] = set()
    for moment in sorted(set(chosen)):
        number = list(STATUS)[moment % 3]
        running = run_until(moment, number)
        seen.add(goes_on(running, running.wait(SOON), f"{moment}/run", number, expected))
    assert seen == {"before", "saved", "done"}


def wait_for(seen: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def patched(owner: Any, name: str, after: int) -> Iterator[None]:
    """Let call number `after` of a function say so and take a minute."""
    real, calls = getattr(owner, name), 0

    def function(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            Path("reached").touch()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(0.05)
        return real(*arguments, **options)

    setattr(owner, name, function)
    yield


@pytest.mark.parametrize("second", STATUS)
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(Trainer, "step_no_sync", 5), (checkpoint.safetensors.torch, "save", 3)],
    ids=["in a step", "while a checkpoint is written"],
)
def test_a_second_signal_stops_at_once(
    undisturbed: Place, owner: Any, name: str, after: int, second: signal.Signals
) -> None:
    expected, _ = undisturbed
    running = Forked(*command("run"), within=lambda: patched(owner, name, after))
    wait_for(Path("reached").exists)
    os.kill(running.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert os.waitpid(running.pid, os.WNOHANG) == (0, 0)
    os.kill(running.pid, second)
    assert running.wait(2.0) == 130
    assert running.stderr == "fastcifar: interrupted\n"
    assert checkpoint.load_newest(Path("run/checkpoints")).step == 3  # of the first epoch
    again = Forked("train", "--resume", "run")
    assert again.wait() == 0, again.stderr
    assert tiny_runs.equal(tiny_runs.weights(Path("run")), expected)
    assert not list(Path("run/checkpoints").glob(".tmp-*"))


@contextlib.contextmanager
def slowed(*, ignoring: bool = False) -> Iterator[None]:
    """Make a run of a second, which may be one that nohup started."""
    real = Trainer.step_no_sync

    def step(self: Trainer, *arguments: Any) -> None:
        time.sleep(0.1)
        real(self, *arguments)

    Trainer.step_no_sync = step  # type: ignore[method-assign]
    if ignoring:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield


@pytest.mark.parametrize("ignored", [False, True], ids=["plain", "nohup"])
def test_a_closed_terminal_loses_nothing(undisturbed: Place, ignored: bool) -> None:
    expected, _ = undisturbed
    running = Forked(*command("run"), within=lambda: slowed(ignoring=ignored), on_terminal=True)
    shown = b""
    while b"plan" not in shown:
        assert select.select([running.terminal], [], [], 30)[0]
        shown += os.read(running.terminal, 65536)
    os.close(running.terminal)
    assert running.wait() == (0 if ignored else 129)
    if not ignored:
        assert 0 < checkpoint.load_newest(Path("run/checkpoints")).step < 6
        again = Forked("train", "--resume", "run")
        assert again.wait() == 0, again.stderr
    assert tiny_runs.equal(tiny_runs.weights(Path("run")), expected)


def test_conversions_stopped_at_random_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3000, 16, 16, 3), np.uint8)
    np.savez("mine.npz", x=images, y=np.arange(3000) % 7)

    def stopped(moment: int) -> tuple[str, int]:
        @contextlib.contextmanager
        def within() -> Iterator[None]:
            yield from signalled(".", moment, list(STATUS)[moment % 3], f"seen-{moment}")

        running = Forked("convert", "mine.npz", f"out-{moment}", within=within)
        return running.wait(SOON), len(running.stderr.splitlines())

    assert stopped(0) == (0, 0)
    digest, count = ArrayStore("out-0").digest, len(Path("seen-0").read_text().splitlines())
    for moment in random.Random(0).sample(range(1, count + 1), min(effort(4), count)):
        status, lines = stopped(moment)
        assert status in (0, STATUS[list(STATUS)[moment % 3]])
        assert lines == (status != 0)
        if status:
            assert not Path(f"out-{moment}").exists()
        else:  # it came when all was done
            assert ArrayStore(f"out-{moment}", verify=True).digest == digest
        assert not list(Path().glob(".tmp-*"))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("second", [False, True] if effort(1) > 1 else [False], ids=lambda second: f"second={second}")
def test_seeds_side_by_side_stop_together(undisturbed: Place, second: bool) -> None:
    running = Forked(*command("all", arch="small", epochs="500", seeds="0..1", parallel="2"))
    begun = [Path(f"all/seed-{seed}/checkpoints") for seed in (0, 1)]
    wait_for(lambda: all(checkpoint.saved(path) for path in begun), 60)
    workers = children_of(running.pid)
    os.kill(running.pid, signal.SIGTERM)
    if second:
        time.sleep(0.05)  # or the system would make one of them
        os.kill(running.pid, signal.SIGTERM)
    status = running.wait(SOON)
    assert status == (130 if second else 143)
    kept = "go on from their last epoch" if second else "are saved"
    said = f"stopped: 0 of 2 runs have ended, those begun {kept}; go on with: fastcifar train --resume all"
    assert running.stderr == f"fastcifar: {said}\n"
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert [run["state"] for run in json.loads(Path("all/seeds.json").read_text())["runs"]] == ["unfinished"] * 2
    assert all(checkpoint.load_newest(path).skipped == () for path in begun)


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
REAL = ["--dataset", "digits", "--arch", "small", "--epochs", "2", "--batch-size", "256", "--device", "cpu"]


def real(*options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcifar.train", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )

    def listens() -> bool:
        masks = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line]
        return bool(int(masks[0].split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    wait_for(listens)  # the interpreter itself begins for some hundredths of a second
    return process


def test_real_processes_are_ended_at_once_by_a_signal_in_their_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCIFAR_HOME", "home")
    for moment, (number, status) in enumerate(STATUS.items()):
        process = real(*REAL, "--out", "run")
        time.sleep(moment * 0.4)
        sent = time.monotonic()
        process.send_signal(number)
        _, error = process.communicate(timeout=SOON)
        assert (process.returncode, error) == (status, f"fastcifar: stopped by {number.name}; nothing was changed\n")
        assert time.monotonic() - sent < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(effort(1) == 1, reason="takes many minutes: make test-long")
@pytest.mark.timeout(3000)
def test_fifty_real_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTCIFAR_HOME", "home-undisturbed")
    started = time.monotonic()
    process = real(*REAL, "--out", "undisturbed")
    assert process.wait() == 0
    seconds, expected = time.monotonic() - started, tiny_runs.weights(Path("undisturbed"))
    draw, seen = random.Random(0), dict.fromkeys(("before", "saved", "done"), 0)
    for moment in range(50):
        number, run = list(STATUS)[moment % 3], Path(f"run-{moment}")
        monkeypatch.setenv("FASTCIFAR_HOME", f"home-{moment}")
        process = real(*REAL, "--out", str(run))
        time.sleep(seconds * (moment + draw.random()) / 50)
        process.send_signal(number)
        _, error = process.communicate(timeout=SOON)
        assert process.returncode in (0, STATUS[number]), error
        assert error.count("\n") == (process.returncode != 0), error
        assert not [path for place in tmp_path.iterdir() for path in place.rglob(".tmp-*")]
        if process.returncode == 0:
            seen["done"] += 1
        elif checkpoint.saved(run / "checkpoints"):
            seen["saved"] += 1
            assert error.endswith(f"go on with: fastcifar train --resume {run}\n")
            assert real("--resume", str(run)).wait() == 0
        else:
            seen["before"] += 1
            assert "nothing was" in error
            assert not run.exists()
            continue
        assert tiny_runs.equal(tiny_runs.weights(run), expected)
        shutil.rmtree(run)
    assert all(seen.values()), seen
