"""What `gpu_check` needs beside a CUDA device: guarded steps, varied options, a comparison of bits.

Example:
    run_guarded({"equality": equality}, [Path("gpu_check.json")], seconds=300)

Legend: B rows of a batch, C channels, H x W pixels.
"""

import atexit
import json
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastcifar.kernels.plan import Plan, scale_and_shift  # noqa: E402

Step = Callable[[], Any]
SHAPES = ((32, 32, 3), (32, 32, 3), (28, 28, 1), (8, 8, 1), (5, 7, 4), (96, 96, 3))


def run_guarded(steps: Mapping[str, Step], paths: Sequence[Path], *, seconds: float, **more: Any) -> bool:
    """Run all steps, whatever fails, and write `paths` anew after each, so that a kill loses one step only.

    Args:
        steps: what to run, in this order.
        paths: of the JSON file, and of its copies.
        seconds: after which no further step begins.
        more: what else the file says.

    Returns:
        Whether all steps ran and none failed.
    """
    results: dict[str, Any] = {}
    began = time.monotonic()
    for name, step in steps.items():
        started = time.monotonic()
        if started - began > seconds:
            results[name] = {"ok": False, "error": f"not begun: {seconds:g} s had passed"}
        else:
            try:
                results[name] = {"ok": True, "result": step()}
            except Exception:
                results[name] = {"ok": False, "error": traceback.format_exc()}
            results[name]["seconds"] = round(time.monotonic() - started, 2)
        text = json.dumps({**more, "steps": results}, indent=2) + "\n"
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{'ok    ' if results[name]['ok'] else 'FAILED'} {name}", flush=True)
    return all(result["ok"] for result in results.values())


class OwnTests:
    """The tests that need a CUDA device, in a process of their own, beside steps that take no times."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def begin(self, step: Step) -> Step:
        """`step`, with the tests begun first."""

        def both() -> Any:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests/gpu"]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            self._process = subprocess.Popen(command, cwd=ROOT, **pipes)
            atexit.register(self._process.kill)  # whatever becomes of us, and of the step that waits for them
            return step()

        return both

    def end(self) -> dict[str, Any]:
        """Their last line, as soon as they have ended."""
        if self._process is None:
            raise AssertionError("they were not begun")
        try:
            said, _ = self._process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, _ = self._process.communicate()
            raise AssertionError(f"pytest did not end\n{said[-8000:]}") from None
        if self._process.returncode:
            raise AssertionError(f"pytest ended with {self._process.returncode}\n{said[-8000:]}")
        return {"last_line": said.strip().splitlines()[-1]}


def option_sets(count: int) -> Iterator[tuple[tuple[int, int, int], dict[str, Any]]]:
    """`count` (shape, options of a plan) that vary all options; the same ones each time."""
    choose = random.Random(0).choice
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        side = min(shape[:2])
        options = {
            "order": ("random", "block", "sequential")[(number + number // len(SHAPES)) % 3],
            "dtype": choose(["float32", "bfloat16", "float16"]),
            "flip": choose(["none", "random", "alternating"]),
            "padding": choose(["reflect", "zero"]),
            "crop": choose([0, 2, side - 1]),
            "cutout": choose([0, 0, side // 2]),
            "channels_last": choose([True, False]),
            "block_size": choose([7, 64]),
            "window": choose([1, 3]),
            "seed": choose([0, 2**64 - 1]),
        }
        yield shape, options


def make_plan(shape: tuple[int, int, int], images: int, **options: Any) -> Plan:
    """A plan of a part of `images` images."""
    channels = shape[2]
    scale, shift = scale_and_shift("standardize", np.linspace(90, 130, channels), np.linspace(50, 70, channels))
    return Plan(**{"samples": images - 5, "offset": 5, "scale": scale, "shift": shift, **options})


def same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Whether two batches are of the same shape, type, memory format and bits, on whatever devices."""
    whole = {2: torch.int16, 4: torch.int32}[a[0].element_size()]
    if (a[0].dtype, a[0].shape, a[0].stride()) != (b[0].dtype, b[0].shape, b[0].stride()):
        return False
    return torch.equal(a[0].cpu().view(whole), b[0].cpu().view(whole)) and torch.equal(a[1].cpu(), b[1].cpu())


def without_failures(raced: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What contestants of a race measured, all of them.

    Raises:
        RuntimeError: some failed; the message says which, and why.
    """
    if failed := [f"{name}: {result['failed']}" for name, result in raced.items() if "failed" in result]:
        raise RuntimeError("; ".join(failed))
    return raced


def bytes_moved(shape: tuple[int, int, int], batch: int, dtype: str) -> int:
    """What a launch must read and write: pixels, the batch, and a label each."""
    elements = shape[0] * shape[1] * shape[2]
    return batch * (elements * (1 + (4 if dtype == "float32" else 2)) + 16)


def launches_for(moved: int) -> int:
    """Launches in one measurement: some 3 ms at 2 TB/s, so that what surrounds them counts for nothing."""
    return max(4, min(400, 6_000_000_000 // moved))


def noise(count: int, shape: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8[count, H, W, C] and int64[count]."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, *shape), np.uint8), generator.integers(0, 10, count)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error where torch waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def timed(call: Step, launches: int) -> Callable[[], float]:
    """Seconds of one of `launches` calls in a CUDA graph, so that the host's time is not in it."""
    call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for _ in range(launches):
            call()

    def measure() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        captured.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / launches

    return measure
