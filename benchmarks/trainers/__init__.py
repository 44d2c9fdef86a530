"""Who runs in the race of recipes: a file each, which trains in the contestant's own environment.

A file has one function, and none but fastcifar's own imports fastcifar:

    train(job, **setting) -> Outcome        # one whole run, see `common`

All train on the same images and are tested on the same ones; only what a job says is the same beside that.
"""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import OWN

__all__ = ["BUDGETS", "CONTESTANTS", "Contestant"]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One entry of the race.

    Attributes:
        name: on the command line and in the records.
        title: in tables and pictures.
        file: in this folder, without `.py`.
        setting: what `train` is given beside the job.
        environment: see `peers`.
        package: its line in the environment's list; a new version is another recipe.
        base: whether the others are compared with it.
        net: its own net's name; "" where it trains the net that the race names.
        step: its numbers of epochs are multiples of this.
        remark: what to know of it, under the tables.
    """

    name: str
    title: str
    file: str
    setting: dict[str, Any] = field(default_factory=dict)
    environment: str = OWN
    package: str = ""
    base: bool = False
    net: str = ""
    step: float = 1.0
    remark: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is a recipe of fastcifar's."""
        return self.file == "fastcifar_fit"


_AMP = {"amp": True}
"""In bfloat16 where the CPU has units for it, as --amp does."""

_AIRBENCH: dict[str, Any] = {
    "file": "airbench94",
    "environment": "torch",
    "package": "airbench",
    "base": True,
    "net": "airbench94",
    "step": 0.01,
    "remark": "airbench94 is its package's own code and recipe, made to run on a CPU, with float32 for half",
}

CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            name="report",
            title="the report's recipe",
            file="fastcifar_fit",
            setting={"recipe": "report"},
            base=True,
        ),
        Contestant(name="fast", title="fastcifar", file="fastcifar_fit", setting={"recipe": "fast"}),
        Contestant(name="fast-amp", title="fastcifar, --amp", file="fastcifar_fit", setting={"recipe": "fast", **_AMP}),
        Contestant(name="long", title="fastcifar, long", file="fastcifar_fit", setting={"recipe": "long"}),
        Contestant(
            name="long-amp", title="fastcifar, long, --amp", file="fastcifar_fit", setting={"recipe": "long", **_AMP}
        ),
        Contestant(name="airbench94", title="airbench94", setting={"batch_size": 1024}, **_AIRBENCH),
        Contestant(
            name="airbench94-amp",
            title="airbench94, bfloat16",
            setting={"batch_size": 1024, **_AMP},
            **{**_AIRBENCH, "remark": "In bfloat16 its net is under autocast, as ours with --amp"},
        ),
        # Its loss is summed over a batch, so its learning rate holds for any batch size; in the few epochs that a
        # CPU has time for, smaller batches give it more steps than its published 1,024.
        Contestant(name="airbench94-256", title="airbench94, batch 256", setting={"batch_size": 256}, **_AIRBENCH),
    )
}

BUDGETS: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("big", "report"): {"report": (20,), "fast": (2, 3), "long": (27,)},
    ("small", "report"): {"report": (20,), "fast": (2, 3), "long": (31,)},
    ("fast", "full"): {"fast": (3, 8, 16), "airbench94": (1.15, 2, 4)},
}
"""(arch, split) -> contestant -> its numbers of epochs, each a run, where the command line gives none."""
