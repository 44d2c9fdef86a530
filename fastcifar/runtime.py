"""What this machine can do, and what a run does with it: device, precision, memory format, compilation.

The only module that sets global seeds and `torch.backends`. Each choice carries its reason, which the panel at the
start of a run shows.

    runtime = choose(TrainConfig(amp=True))
    with runtime.autocast(): ...
"""

import contextlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastcifar.config import TrainConfig
from fastcifar.errors import ConfigError
from fastcifar.ranks import ALONE, Ranks

__all__ = [
    "ALONE_IN_PROCESS",
    "Runtime",
    "arithmetic",
    "choose",
    "environment",
    "find_device",
    "is_compile_error",
    "limit_threads",
    "local_seed",
    "out_of_memory",
    "quiet_profiler",
    "seed_everything",
    "use_own_stream",
]

ALONE_IN_PROCESS = threading.RLock()
"""Held for what no two runs in threads of one process may do at once: draw initial weights from torch's generators,
compile, capture a CUDA graph, draw figures in this process."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The choices for one run.

    Attributes:
        device: where the net and the batches are.
        precision: type that matrix products and convolutions compute in.
        scale_gradients: whether float16 gradients need a GradScaler.
        memory_format: of images and filters.
        compile: whether the net is compiled.
        reasons: (what, choice and why) for device, precision, layout and compile, and for several ranks.
        ranks: how many processes train together.
    """

    device: torch.device
    precision: torch.dtype
    scale_gradients: bool
    memory_format: torch.memory_format
    compile: bool
    reasons: tuple[tuple[str, str], ...]
    ranks: int = 1

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for a forward pass."""
        if self.precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)


def choose(config: TrainConfig, ranks: Ranks = ALONE) -> Runtime:
    """Choose for this machine, and this rank, what `config` leaves open.

    Raises:
        ConfigError: the device is not there, or cannot do what was forced.
    """
    own = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    # a rank looks for its own GPU alone: it would keep some of the first one's memory, too
    device = find_device(f"cuda:{ranks.local}" if ranks.size > 1 and own else config.device)
    if ranks.size > 1 and device.type == "cuda":
        if not own:
            raise ConfigError(f"device {config.device} cannot be used by {ranks.size} ranks: use cuda, a GPU for each")
        torch.cuda.set_device(device)  # NCCL's collectives are on the current one
    precision, precision_reason = _precision(config, device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    layout = "channels-last" if config.channels_last else "contiguous (channels first), as --no-channels-last asks"
    compiled, compile_reason = _compile(config, device, ranks)
    joined_by = "NCCL" if device.type == "cuda" else "gloo"
    # No search for cuDNN's algorithms (`torch.backends.cudnn.benchmark`): on an H200 it takes 4 s for net fast, in each
    # thread anew, for 2 % of a step's time; and what it finds is not always the same.
    return Runtime(
        device=device,
        precision=precision,
        scale_gradients=precision == torch.float16,
        memory_format=memory_format,
        compile=compiled,
        reasons=(
            ("device", _device_name(device)),
            ("precision", precision_reason),
            ("layout", layout),
            ("compile", compile_reason),
            *([("ranks", f"{ranks.size}, each with a part of every batch, joined by {joined_by}")] * (ranks.size > 1)),
        ),
        ranks=ranks.size,
    )


def find_device(name: torch.device | str) -> torch.device:
    """The device of that name, with its index; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        if reason.startswith("Expected one of"):  # and then some twenty kinds
            reason = "no kind of device has that name"
        raise ConfigError(f"device {str(name)!r} cannot be used here ({reason}): try 'cpu'") from None
    return probe.device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu: {_cpu_name()}, {(n := torch.get_num_threads())} thread{'s' * (n != 1)}"
    return str(device)


def _cpu_name() -> str:
    return _first_processor().get("model name") or platform.processor() or platform.machine()


def _cpu_model() -> str | None:
    """Such as "family 26, model 2": virtual machines hide the name."""
    fields = _first_processor()
    with contextlib.suppress(KeyError):
        return f"family {fields['cpu family']}, model {fields['model']}"
    return None


def _first_processor() -> dict[str, str]:
    """What Linux tells of it, by name; nothing elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as handle:
        first, _, _ = handle.read().partition("\n\n")
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return {}


def _bfloat16_units() -> str:
    """What of this CPU multiplies bfloat16, if anything does."""
    return " ".join(name for name in ("avx512_bf16", "amx_bf16", "bf16") if torch.cpu.get_capabilities().get(name))


def _precision(config: TrainConfig, device: torch.device) -> tuple[torch.dtype, str]:
    if not config.amp:
        tf32 = ", convolutions in TF32 where the GPU has it" if device.type == "cuda" else ""
        return torch.float32, f"float32{tf32}: --amp was not asked for"
    if config.amp_dtype != "auto":
        forced: torch.dtype = getattr(torch, config.amp_dtype)
        return forced, f"{config.amp_dtype} autocast: forced by --amp-dtype"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"bfloat16 autocast: sm_{major}{minor} has bfloat16 units"
        return torch.float16, f"float16 autocast with gradient scaling: sm_{major}{minor} has no bfloat16 units"
    if device.type == "cpu":
        if _bfloat16_units():
            return torch.bfloat16, "bfloat16 autocast: this CPU has bfloat16 units"
        # measured without them: Small, batch 256, 24 images/s in bfloat16 against 337 in float32
        return torch.float32, "float32, though --amp: this CPU has no bfloat16 units and would be many times slower"
    return torch.float32, f"float32, though --amp: not known to gain on {device.type}; --amp-dtype forces it"


def _compile(config: TrainConfig, device: torch.device, ranks: Ranks = ALONE) -> tuple[bool, str]:
    if config.compile != "auto":
        return config.compile == "on", f"{config.compile}, as --compile {config.compile} asks"
    if ranks.size > 1:
        return False, "off: with several ranks every BatchNorm would break the graph"
    if device.type == "cuda":
        # measured on an H100, net fast with ReLU: 219 s of compiling, then 0.8 of the time of a step as a CUDA graph
        return False, "off: it takes minutes, more than a run gains by it; --compile on forces it"
    return False, f"off: on {device.type} it costs more than it gains for these nets"


def use_own_stream(device: torch.device) -> None:
    """On CUDA, let what this thread does from now on run beside what others do."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def out_of_memory(error: BaseException) -> str | None:
    """What it says of memory that was not there; None if it is another error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return str(error).split(". ")[0] or "no more can be had"
    _, found, said = str(error).partition("DefaultCPUAllocator: ")  # a RuntimeError like any other
    return said.split(". ")[0] if found else None


def is_compile_error(error: BaseException) -> bool:
    """Whether torch.compile raised it. Importing its exceptions takes seconds: only a compiled net has done so."""
    exceptions = sys.modules.get("torch._dynamo.exc")
    return exceptions is not None and isinstance(error, exceptions.TorchDynamoException)


def seed_everything(seed: int) -> None:
    """Seed torch's generators, from which the initial weights come. Order and augmentation draw from no generator."""
    torch.manual_seed(seed)


def quiet_profiler() -> None:
    """Keep torch's profiler from writing lines of its own to standard error; a level that the user set stays."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when a process first profiles; 6 is enough in torch 2.13


_seeding = threading.RLock()  # the generators are the process's


def _after_fork() -> None:
    """A forked child has locks as they were, perhaps held by a thread that it does not have."""
    global _seeding
    _seeding = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def local_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed (0 to 2**64 - 1) torch's generators of the CPU and of `device`, and put them back; one thread at a time."""
    kind = device.type if device.type != "cpu" else None
    devices = [] if kind is None else [device]
    with _seeding, torch.random.fork_rng(devices=devices, **({} if kind is None else {"device_type": kind})):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which reaches every GPU
        if kind == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif kind is not None:
            torch.get_device_module(kind).manual_seed(seed)
        yield


def environment() -> dict[str, Any]:
    """Versions and hardware, as JSON values: what a result's reader needs to compare it."""
    import numba
    import sklearn

    import fastcifar

    cuda = torch.cuda.is_available()
    return {
        "fastcifar": fastcifar.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
        "scikit-learn": sklearn.__version__,
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_model": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def arithmetic(runtime: Runtime) -> dict[str, str]:
    """What the last bits of a result depend on beside the options: equal on both sides, a run goes on bit for bit."""
    device = runtime.device
    units = f" {_bfloat16_units()}" if runtime.precision == torch.bfloat16 else ""
    cpu = f"{torch.backends.cpu.get_cpu_capability()}{units}, {torch.get_num_threads()} threads"
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "precision": str(runtime.precision).removeprefix("torch."),
        "compile": "on" if runtime.compile else "off",
        "torch": torch.__version__,
        "ranks": str(runtime.ranks),
        "steps": dict(runtime.reasons).get("steps", "one operation after another").partition(":")[0],
    }


def limit_threads(threads: int) -> None:
    """Compute with that many threads in this process; the CPU kernel asks torch, so this holds for it too."""
    torch.set_num_threads(threads)
