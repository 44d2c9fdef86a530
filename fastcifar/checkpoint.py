"""Checkpoints: a folder for each saved step, there whole or not at all, with a digest of each file.

`model.safetensors` holds the net's parameters and buffers under their names, for anyone to load;
`training.safetensors` holds the optimiser's, scaler's and metrics' tensors; `manifest.json` the rest.
No pickle is written or read.

    save(run / "checkpoints", step=100, model=model.state_dict(), training={}, state={"epoch": 1})
    newest = load_newest(run / "checkpoints")
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastcifar.errors import CheckpointError, OutputError
from fastcifar.publish import publish_folder, remove_stale

__all__ = ["Checkpoint", "load_newest", "save"]

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

    Raises:
        OutputError: it cannot be written; those there before are intact.
    """
    path = folder / f"{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        if path.exists() and not _is_sound(path):
            shutil.rmtree(path)  # or it would stand in the new one's place
        with publish_folder(path) as temporary:
            digests = {}
            for name, tensors in zip(_FILES, (model, training), strict=True):
                content = safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
                (temporary / name).write_bytes(content)
                digests[name] = hashlib.sha256(content).hexdigest()
            manifest = {"format": _FORMAT, "version": _VERSION, "step": step, "files": digests, "state": dict(state)}
            manifest["digest"] = _digest(manifest)
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"checkpoint {error.filename or path} cannot be written: {error.strerror or error}") from None
    for old in sorted(_saved(folder))[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_newest(folder: Path) -> Checkpoint:
    """Read the newest checkpoint whose digests are right.

    Args:
        folder: a run's `checkpoints`.

    Raises:
        CheckpointError: there is none, or the newest was written by a newer fastcifar.
    """
    skipped: list[str] = []
    for path in sorted(_saved(folder), reverse=True):
        try:
            return _load(path, tuple(skipped))
        except _DamagedError as error:
            skipped.append(f"skipped checkpoint {path}: {error}")
    detail = f" ({'; '.join(skipped)})" if skipped else ""
    raise CheckpointError(f"{folder} holds no checkpoint to go on from{detail}")


class _DamagedError(Exception):
    pass


def _is_sound(path: Path) -> bool:
    try:
        _load(path, ())
    except (_DamagedError, CheckpointError):
        return False
    return True


def _saved(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()] if folder.is_dir() else []


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _load(path: Path, skipped: tuple[str, ...]) -> Checkpoint:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _DamagedError(f"manifest.json cannot be read ({type(error).__name__})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise _DamagedError("manifest.json is not a checkpoint's")
    if manifest.get("digest") != _digest(manifest):
        raise _DamagedError("manifest.json does not have its digest")
    if manifest.get("version") != _VERSION:
        version = manifest.get("version")
        raise CheckpointError(
            f"{path} has format version {version!r}, this fastcifar reads {_VERSION}: update fastcifar"
        )
    tensors = []
    for name in _FILES:
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise _DamagedError(f"{name}: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != manifest["files"].get(name):
            raise _DamagedError(f"{name} does not have its digest")
        try:
            tensors.append(safetensors.torch.load(content))
        except safetensors.SafetensorError as error:
            raise _DamagedError(f"{name}: {error}") from None
    return Checkpoint(
        path=path,
        step=manifest["step"],
        model=tensors[0],
        training=tensors[1],
        state=manifest["state"],
        skipped=skipped,
    )
