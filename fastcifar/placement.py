"""Where a store's bytes are while a loader uses them, and why.

| placement | the bytes are | good for |
| --- | --- | --- |
| `device` | on the device that makes the batches, all of them | stores that fit there |
| `host` | in host memory; batches are copied one ahead | stores larger than the device's memory |
| `stream` | on disk, mapped, read ahead | stores larger than memory |

On a CPU `host` is `device`. All give identical batches.

    placement, reason = choose_placement("auto", store, torch.device("cpu"))
"""

import weakref
from typing import Literal

import torch
from torch import Tensor

from fastcifar.data.store import ArrayStore
from fastcifar.memory import free_memory

__all__ = ["Placement", "choose_placement", "place"]

Placement = Literal["auto", "device", "host", "stream"]

_SHARE = 0.6
"""Of the memory that is free, what a store may take: the net, its gradients and the batches need the rest."""

# One copy of a store's bytes on a device, for as long as a loader uses it.
_placed: "weakref.WeakValueDictionary[tuple[str, torch.device], Tensor]" = weakref.WeakValueDictionary()


def choose_placement(asked: Placement, store: ArrayStore, device: torch.device) -> tuple[Placement, str]:
    """The placement to use, and a sentence that says why.

    Args:
        asked: auto, or what the user wants.
        store: the store.
        device: where batches are made.
    """
    host = torch.device("cpu")
    if asked == "host" and device == host:
        return "device", "device: on a CPU the host's memory is the device's"
    if asked != "auto":
        return asked, f"{asked}: as asked"
    size = store.images.nbytes
    shortages: dict[torch.device, str] = {}
    places: tuple[tuple[Placement, torch.device], ...] = (("device", device), ("host", host))
    for placement, place_ in places if device != host else places[:1]:
        if (store.digest, place_) in _placed:
            return placement, f"{placement}: it is in the memory of {place_} already"
        needed = {one: free_memory(one) for one in (place_, host)}  # a device's come through the host's memory
        short = {one: free for one, free in needed.items() if free is not None and size > _SHARE * free}
        if not short:
            free = needed[place_]
            room = "of unknown free memory" if free is None else f"of {_mb(free)} of free memory"
            return placement, f"{placement}: {_mb(size)} {room} on {place_}{''.join(shortages.values())}"
        shortages |= {
            one: f"; {_mb(size)} are more than {_SHARE:.0%} of the {_mb(free)} that are free on {one}"
            for one, free in short.items()
        }
    return "stream", f"stream{''.join(shortages.values())}"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def place(store: ArrayStore, device: torch.device) -> Tensor:
    """The store's images on `device`, uint8[N, H, W, C]; copied and checked the first time.

    Raises:
        DataError: they do not have their checksums.
    """
    images = _placed.get((store.digest, device))
    if images is None:
        images = torch.from_numpy(store.load()).to(device)
        _placed[store.digest, device] = images
    return images
