"""The net that a run trained, from the folder of the run; its data need not be there.

Example:
    model = load_model("runs/cifar10-big-fast-20260101-120000", device="cuda")
    logits = model(images)
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fastcifar import checkpoint, runs
from fastcifar.checks import check_kind
from fastcifar.errors import CheckpointError
from fastcifar.nets import build_model
from fastcifar.runtime import find_device
from fastcifar.several import holds_several, members
from fastcifar.trainer import load_weights

__all__ = ["find_run", "load_model", "net_of", "newest_of"]

_log = logging.getLogger(__name__)


def load_model(run: Path | str, *, device: torch.device | str = "cpu") -> nn.Module:
    """The net of a run's newest sound checkpoint, in eval mode.

    Args:
        run: its folder.
        device: where the net is put.

    Returns:
        Takes floating [B, C, H, W], H and W from 17 to 32, scaled as the run's images were: standardised, but raw with
        recipe report. Gives logits, floating [B, K], in the order of the store's `classes`.

    Raises:
        CheckpointError: `run` is no run, or several, or it has no sound checkpoint.
        ConfigError: there is no such device here.
    """
    place, found = find_device(device), find_run(run)
    return net_of(found, newest_of(found, _log.warning), place).eval()


def find_run(path: Path | str) -> runs.Run:
    """The run in a folder.

    Raises:
        CheckpointError: it holds none, or several.
    """
    check_kind("run", path, Path | str, "a folder")
    path = Path(path)
    if holds_several(path):
        one = next(iter(members(path)), path / "...")
        raise CheckpointError(f"{path} holds several runs: name one of them, such as {one}")
    return runs.reopen(path)


def newest_of(run: runs.Run, say: Callable[[str], object]) -> checkpoint.Checkpoint:
    """A run's newest sound checkpoint; `say` is told of those that had to be skipped.

    Raises:
        CheckpointError: there is none, or it is of other options than the run.
    """
    saved = checkpoint.load_newest(run.checkpoints)
    for line in saved.skipped:
        say(line)
    run.check(saved)
    return saved


def net_of(run: runs.Run, saved: checkpoint.Checkpoint, device: torch.device) -> nn.Module:
    """The net of a checkpoint, on the device and in the run's memory format. No generator is drawn from.

    Raises:
        CheckpointError: it is of another net.
    """
    with torch.device("meta"):  # shapes alone
        any_net = build_model(run.config.arch, num_classes=1)
        names = [name for name, parameter in any_net.named_parameters() if parameter.dim() > 1]
        first, last = (saved.model.get(name, any_net.get_parameter(name)) for name in (names[0], names[-1]))
        channels = first.shape[1] if first.dim() > 1 else 1
        model = build_model(run.config.arch, num_classes=len(last), in_channels=channels)
    load_weights(model.to_empty(device="cpu"), saved.model)
    layout = torch.channels_last if run.config.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)  # type: ignore[no-any-return, call-overload]
