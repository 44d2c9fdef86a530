"""Checkpoints: a folder for each saved step, there whole or not at all, with a digest of each file.

`model.safetensors` holds the net's parameters and buffers under their names, for anyone to load;
`training.safetensors` holds the optimiser's, scaler's and metrics' tensors; `manifest.json` the rest.
No pickle is written or read.

    saver = Saver(run / "checkpoints")
    saver.save(step=100, model=model.state_dict(), training={}, state={"epoch": 1})    # in the background
    saver.wait()
    newest = load_newest(run / "checkpoints")
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastcifar.errors import CheckpointError, OutputError, one_line
from fastcifar.publish import publish_bytes, publish_folder, read_file, remove_folder, remove_stale

__all__ = ["Checkpoint", "Saver", "load_newest", "problem", "save", "saved"]

_FORMAT, _VERSION = "fastcifar-checkpoint", 1
_FILES = ("model.safetensors", "training.safetensors")
_KEEP = 2  # the newest, and one more in case it is damaged


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was saved.

    Attributes:
        path: its folder.
        step: optimiser steps done.
        model: the net's parameters and buffers.
        training: tensors of the optimiser, scaler and metrics.
        state: JSON values: config hash, loader state, epochs done, versions.
        skipped: a line for each newer checkpoint that could not be used.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]
    skipped: tuple[str, ...]


def save(
    folder: Path, *, step: int, model: Mapping[str, Tensor], training: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Publish a checkpoint as `folder/<step>` and delete all but the newest ones.

    A step may be saved again with the same tensors and another state: after an evaluation that it was stopped in, say.

    Raises:
        OutputError: it cannot be written; those there before are intact.
    """
    path = folder / f"{step:08d}"
    files = {
        name: safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
        for name, tensors in zip(_FILES, (model, training), strict=True)
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = {"format": _FORMAT, "version": _VERSION, "step": step, "files": digests, "state": dict(state)}
    manifest["digest"] = _digest(manifest)
    text = json.dumps(manifest, indent=1).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        size, free = len(text) + sum(map(len, files.values())), shutil.disk_usage(folder).free
        if size > free:
            raise OutputError(f"checkpoint {path} needs {size:,} bytes, {folder} has {free:,} bytes free")
        if path.exists() and _holds(path, digests):
            publish_bytes(path / "manifest.json", text)
        else:
            if path.exists():
                remove_folder(path)  # or it would stand in the new one's place
            with publish_folder(path) as temporary:
                for name, content in files.items():
                    (temporary / name).write_bytes(content)
                (temporary / "manifest.json").write_bytes(text)
    except OSError as error:
        raise OutputError(f"checkpoint {error.filename or path} cannot be written: {error.strerror or error}") from None
    # a newer one is damaged: this run did not go on from it
    for old in [one for one in saved(folder) if int(one.name) <= step][:-_KEEP]:
        with contextlib.suppress(OSError):
            remove_folder(old)
    return path


class Saver:
    """Saves a run's checkpoints while the run goes on: what is saved is copied at once, and written by a thread.

    Args:
        folder: a run's `checkpoints`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Path] | None = None

    def save(
        self, *, step: int, model: Mapping[str, Tensor], training: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Begin to save, once the one before is written. The tensors may be changed as soon as this returns.

        Raises:
            OutputError: the one before could not be written.
        """
        self.wait()
        copies = [{name: _copy(tensor) for name, tensor in tensors.items()} for tensors in (model, training)]
        content = {"model": copies[0], "training": copies[1], "state": json.loads(json.dumps(state))}
        self._running = self._pool.submit(save, self._folder, step=step, **content)

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            OutputError: it could not be.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self, *, wait: bool = True) -> None:
        """Wait, if asked to, and end the thread; an error that nobody waited for is dropped."""
        self._pool.shutdown(wait=wait, cancel_futures=not wait)


def _copy(tensor: Tensor) -> Tensor:
    own = tensor.detach()
    return own.clone() if own.device.type == "cpu" else own.cpu()


def load_newest(folder: Path) -> Checkpoint:
    """Read the newest checkpoint whose digests are right.

    Args:
        folder: a run's `checkpoints`.

    Raises:
        CheckpointError: there is none, or the newest was written by a newer fastcifar.
    """
    skipped: list[str] = []
    for path in reversed(saved(folder)):
        try:
            return _load(path, tuple(skipped))
        except _DamagedError as error:
            skipped.append(f"skipped checkpoint {path}: {error}")
    detail = f" ({'; '.join(skipped)})" if skipped else ""
    raise CheckpointError(f"{folder} holds no checkpoint to go on from{detail}")


def saved(folder: Path) -> list[Path]:
    """The folders of the checkpoints in a run's `checkpoints`, the newest last."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.glob("*") if re.fullmatch("[0-9]{8,}", path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def problem(path: Path) -> str | None:
    """What is wrong with the checkpoint in folder `path`, in a line; None if nothing is."""
    try:
        _load(path, ())
    except (_DamagedError, CheckpointError) as error:
        return str(error)
    return None


def _holds(path: Path, digests: Mapping[str, str]) -> bool:
    """Whether a sound checkpoint is there whose files have these digests."""
    return problem(path) is None and json.loads(read_file(path / "manifest.json"))["files"] == digests


class _DamagedError(Exception):
    pass


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    kinds = {"version": int, "step": int, "files": dict, "state": dict}
    if manifest.get("version") != _VERSION:
        kinds = {"version": int}  # a newer one's may have other things
    return all(type(manifest.get(key)) is kind for key, kind in kinds.items())


def _load(path: Path, skipped: tuple[str, ...]) -> Checkpoint:
    try:
        manifest = json.loads(read_file(path / "manifest.json"))
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise _DamagedError("manifest.json is not a checkpoint's")
        if manifest.get("digest") != _digest(manifest) or not _is_complete(manifest):
            raise _DamagedError("manifest.json does not have its digest")
    except (OSError, ValueError, RecursionError) as error:
        raise _DamagedError(f"manifest.json cannot be read ({type(error).__name__})") from None
    if manifest["version"] != _VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest['version']}, this fastcifar reads {_VERSION}: update fastcifar"
        )
    if path.name.isdecimal() and int(path.name) != manifest["step"]:  # a run would go on elsewhere than it is said to
        raise _DamagedError(f"manifest.json is of step {manifest['step']}")
    tensors = []
    for name in _FILES:
        try:
            content = read_file(path / name)
        except OSError as error:
            raise _DamagedError(f"{name}: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != manifest["files"].get(name):
            raise _DamagedError(f"{name} does not have its digest")
        try:
            tensors.append(safetensors.torch.load(content))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise _DamagedError(f"{name}: {one_line(error)}") from None
    return Checkpoint(
        path=path,
        step=manifest["step"],
        model=tensors[0],
        training=tensors[1],
        state=manifest["state"],
        skipped=skipped,
    )
