"""fastcifar: small images from disk into a training step, and a trainer that proves it.

    import fastcifar

    store = fastcifar.open_store("digits")
    for images, labels in fastcifar.Loader(store, split="train", batch_size=512):
        ...
    result = fastcifar.fit(fastcifar.TrainConfig(arch="small", dataset="digits"))

Names are imported when they are first used: importing the package is quick and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcifar.config import Augment, Recipe, TrainConfig
    from fastcifar.data.arrays import convert_arrays
    from fastcifar.data.datasets import open_store
    from fastcifar.data.folders import convert_folder
    from fastcifar.data.items import convert_dataset
    from fastcifar.data.store import ArrayStore
    from fastcifar.engine import FitResult, evaluate_run, fit
    from fastcifar.errors import FastcifarError
    from fastcifar.loader import Batch, Loader
    from fastcifar.nets import build_model
    from fastcifar.seeds import SeedsResult, fit_seeds
    from fastcifar.trained import load_model

__version__ = "0.1.0"

__all__ = [
    "ArrayStore",
    "Augment",
    "Batch",
    "FastcifarError",
    "FitResult",
    "Loader",
    "Recipe",
    "SeedsResult",
    "TrainConfig",
    "__version__",
    "build_model",
    "convert_arrays",
    "convert_dataset",
    "convert_folder",
    "evaluate_run",
    "fit",
    "fit_seeds",
    "load_model",
    "open_store",
]

_HOMES = {
    "ArrayStore": "fastcifar.data.store",
    "Augment": "fastcifar.config",
    "Batch": "fastcifar.loader",
    "FastcifarError": "fastcifar.errors",
    "FitResult": "fastcifar.engine",
    "Loader": "fastcifar.loader",
    "Recipe": "fastcifar.config",
    "SeedsResult": "fastcifar.seeds",
    "TrainConfig": "fastcifar.config",
    "build_model": "fastcifar.nets",
    "convert_arrays": "fastcifar.data.arrays",
    "convert_dataset": "fastcifar.data.items",
    "convert_folder": "fastcifar.data.folders",
    "evaluate_run": "fastcifar.engine",
    "fit": "fastcifar.engine",
    "fit_seeds": "fastcifar.seeds",
    "load_model": "fastcifar.trained",
    "open_store": "fastcifar.data.datasets",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in ("loader", "data", "nets", "config", "engine", "seeds", "ablation"):  # `fastcifar.loader.Loader`
        value = importlib.import_module(f"fastcifar.{name}")
    else:
        raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
