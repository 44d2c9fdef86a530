"""Where the time of a training step goes: named scopes in the step, and a profile of ten steps as files.

The scopes cost 0.3 us each while no profiler is on (measured; `record_function` alone costs 8). The profiler is
torch's own; it watches and changes no result. Only the folder it was given is written.

    with StepProfiler(run / "profile", torch.device("cpu"), tell=reporter.message) as profiler:
        train_epoch(trainer, loader, reporter, step_done=profiler.step)
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

import torch
from torch.autograd import profiler as torch_profiler
from torch.profiler import ProfilerActivity, record_function

from fastcifar.errors import ConfigError, OutputError
from fastcifar.publish import publish_bytes
from fastcifar.runtime import quiet_profiler

__all__ = ["Breakdown", "Phase", "StepProfiler", "breakdown", "phase_scope", "scoped_batches"]

T = TypeVar("T")

Phase: TypeAlias = Literal["loader", "resolution", "forward", "loss", "backward", "optimiser", "totals"]
_PHASES: tuple[Phase, ...] = ("loader", "resolution", "forward", "loss", "backward", "optimiser", "totals")
_BETWEEN = "between them"
_PREFIX = "fastcifar."  # of the scopes' names, in the trace too

_WARM_UP, _STEPS = 3, 10

# These phases are groups of their own, whatever they call; elsewhere the operator's name decides, the first that fits.
_OWN_GROUP: dict[str, str] = {"loader": "loader", "resolution": "resolution", "optimiser": "optimiser"}
_GROUPS = (
    ("convolutions, matrix products", re.compile(r"[cC]onvolution|conv\d|::(add|badd)?b?mm$|::(linear|matmul)$")),
    ("batch normalisation", re.compile("batch_norm|_ReluNorm|_NormGelu")),
    ("pooling", re.compile("pool|_Halve")),
    ("activations", re.compile("relu|threshold|gelu|silu")),
    ("copies and layout", re.compile(r"copy|contiguous|::(clone|to|reorder)")),
)
_REST = "other operators, Python"
_TITLES = (*(title for title, _ in _GROUPS), *_OWN_GROUP.values(), _REST)
_OPERATORS_SHOWN = 40


def phase_scope(phase: Phase) -> AbstractContextManager[object]:
    """The context for one phase of a step: named in the trace of a profiler, nothing while none is on."""
    if torch_profiler._is_profiler_enabled:  # torch's own flag for this: asking costs a twentieth of a scope
        return record_function(_PREFIX + phase)
    return contextlib.nullcontext()


def scoped_batches(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; making each is the phase "loader"."""
    source = iter(batches)
    while True:
        with phase_scope("loader"):
            batch = next(source, None)
        if batch is None:
            return
        yield batch
        del batch  # as in the loader: its memory is used again as soon as nobody else has it


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Mean milliseconds of a step, by phase and again by group of operators; each of the two sums to `total`.

    `clock` says what was measured: "wall" time, or the time a device was busy.
    """

    steps: int
    clock: str
    total: float
    phases: dict[str, float]
    groups: dict[str, float]

    def lines(self) -> list[str]:
        """Both tables as text."""
        total = f"{self.total:.2f} ms of {self.clock} time"
        found = [f"a training step: {total}, mean of {self.steps} after {_WARM_UP} not counted"]
        for title, table in (("by phase", self.phases), ("by operator", self.groups)):
            found.append(f"  {title:32}{'ms':>10}{'share':>9}")
            for name, value in table.items():
                share = 100 * value / self.total if self.total else 0.0
                found.append(f"    {name:30}{value:10.2f}{share:7.1f} %")
        return found


def breakdown(events: Sequence[Any], *, steps: int, device: torch.device) -> Breakdown:
    """Add up what a profiler recorded.

    An operator belongs to the phase in which the host called it, on whichever thread: autograd has threads of its
    own for a GPU, and `backward` waits for them.

    Args:
        events: `torch.autograd.profiler_util.FunctionEvent`, with "ProfilerStep" scopes and those of `phase_scope`.
        steps: how many steps count, the first ones in `events`.
        device: whose time is added up: busy time of a CUDA device, else wall time of the host.
    """
    on_host = [event for event in events if event.device_type.name == "CPU"]
    spans = sorted(_span(event) for event in on_host if event.name.startswith("ProfilerStep"))[:steps]
    scopes = sorted(
        (*_span(event), event.name.removeprefix(_PREFIX)) for event in on_host if event.name.startswith(_PREFIX)
    )
    busy = device.type == "cuda"
    phases: dict[str, float] = dict.fromkeys((*_PHASES, _BETWEEN), 0.0)
    groups: dict[str, float] = dict.fromkeys(_TITLES, 0.0)
    total = 0.0 if busy else sum(end - start for start, end in spans)
    for event in on_host:
        start = event.time_range.start
        if not any(first <= start < last for first, last in spans) or event.name.startswith("ProfilerStep"):
            continue
        took = event.self_device_time_total if busy else event.self_cpu_time_total
        phase = next((name for first, last, name in scopes if first <= start < last), _BETWEEN)
        phases[phase] += took
        groups[_OWN_GROUP.get(phase) or _group(event)] += took
        total += took if busy else 0.0
    if not busy:  # the loop's own Python is in no event
        outside = total - sum(phases.values())
        phases[_BETWEEN] += outside
        groups[_REST] += outside
    scale = 1e-3 / max(1, steps)
    return Breakdown(
        steps=steps,
        clock=f"busy {device}" if busy else "wall",
        total=scale * total,
        phases={name: scale * value for name, value in phases.items()},
        groups={name: scale * value for name, value in groups.items()},
    )


def _span(event: Any) -> tuple[float, float]:
    return event.time_range.start, event.time_range.end


def _group(event: Any) -> str:
    """The operator's own group, or that of the nearest one that called it: zeros for a pool's gradient are pooling."""
    while event is not None:
        for title, pattern in _GROUPS:
            if pattern.search(event.name):
                return title
        event = event.cpu_parent
    return _REST


class StepProfiler:
    """Profiles ten training steps, after three that do not count, and writes what it saw.

    The steps are the first ones within the first `with` block; any later block is not watched. Fewer steps
    count where the block ends earlier.

    Args:
        folder: gets `trace.json.gz` (Chrome's trace format; https://ui.perfetto.dev opens it) and `steps.txt`.
        device: where the net is.
        tell: called with the tables, as lines of text.
        enabled: False for a profiler that does nothing.

    Raises:
        ConfigError: on entering, another profiler is on.
        OutputError: by `step` or on leaving, the files cannot be written.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, tell: Callable[[str], None], enabled: bool = True
    ) -> None:
        self._folder, self._device, self._tell = folder, device, tell
        self._profile: torch.profiler.profile | None = None
        self._pending = enabled
        self._done = 0

    def __enter__(self) -> Self:
        pending, self._pending = self._pending, False
        if not pending:
            return self
        if torch_profiler._is_profiler_enabled:
            raise ConfigError("profile cannot be used while another torch profiler is on: turn one of them off")
        quiet_profiler()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=_WARM_UP, active=_STEPS, repeat=1),
            record_shapes=True,
        )
        self._profile.start()
        return self

    def step(self) -> None:
        """Another step is done. After the last one that counts, this waits for the device and writes the files."""
        if self._profile is None:
            return
        self._profile.step()
        self._done += 1
        if self._done == _WARM_UP + _STEPS:
            self._finish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        if kind is None and self._done > _WARM_UP:
            self._finish()
            return
        profile, self._profile = self._profile, None
        profile.stop()
        if kind is None:
            self._tell(
                f"profile: nothing to show, the epoch had {self._done} steps and the first {_WARM_UP} don't count"
            )

    def _finish(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.stop()
        events = profile.events()  # type: ignore[no-untyped-call]
        lines = breakdown(events, steps=self._done - _WARM_UP, device=self._device).lines()
        order = f"self_{'cuda' if self._device.type == 'cuda' else 'cpu'}_time_total"
        operators = profile.key_averages(group_by_input_shape=True).table(
            sort_by=order, row_limit=_OPERATORS_SHOWN, max_name_column_width=48, max_shapes_column_width=64
        )
        trace = self._folder / "trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=self._folder) as temporary:
                profile.export_chrome_trace(str(Path(temporary) / trace.name))
                publish_bytes(trace, (Path(temporary) / trace.name).read_bytes())
            publish_bytes(self._folder / "steps.txt", "\n".join([*lines, "", operators, ""]).encode())
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(f"{error.filename or self._folder} cannot be written: {reason}") from None
        self._tell("\n".join([*lines, f"  every operator: {self._folder / 'steps.txt'}; as a picture: {trace}"]))
