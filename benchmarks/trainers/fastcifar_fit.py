"""fastcifar's recipes: `fastcifar.fit`, as a user calls it.

Example:
    train(job, recipe="fast").accuracy
"""

import itertools
import json

import torch

from benchmarks.trainers.common import Job, Outcome
from fastcifar import TrainConfig, __version__, fit
from fastcifar.nets import ConvNet
from fastcifar.runtime import choose

__all__ = ["config_of", "train"]

_EVALUATIONS = 20
"""Of a long run, about; on a CPU they take half as long as its training."""


def config_of(job: Job, *, recipe: str, amp: bool = False) -> TrainConfig:
    """The run's options.

    Raises:
        ConfigError: one has a value that is not allowed.
    """
    return TrainConfig(
        arch=job.arch,
        dataset=str(job.store),
        recipe=recipe,
        split=job.split,  # type: ignore[arg-type]  # TrainConfig checks it
        epochs=int(job.epochs),
        seed=job.seed,
        device="cpu",
        amp=amp,
        eval_every=max(1, int(job.epochs) // _EVALUATIONS),
        out=job.scratch / "run",
        change=job.change,
    )


def train(job: Job, *, recipe: str, amp: bool = False) -> Outcome:
    """One run. Its training seconds hold whitening, loader and steps, not the evaluations and checkpoints between.

    The report's recipe runs PyTorch's modules one by one, as its listing does.
    """
    config = config_of(job, recipe=recipe, amp=amp)
    ConvNet.fused = recipe != "report"
    result = fit(config)
    stored = json.loads((result.path / "config.json").read_bytes())
    before, *ends = itertools.accumulate((result.run.warmup_seconds, *(s.train_seconds for s in result.history)))
    return Outcome(
        accuracy=result.test.accuracy,
        tta=result.test.tta,
        tta_accuracy=result.test.tta_accuracy,
        train_seconds=before + result.run.train_seconds,
        eval_seconds=result.run.eval_seconds,
        curve=tuple(
            (end, stats.eval_accuracy)
            for end, stats in zip(ends, result.history, strict=True)
            if stats.eval_accuracy is not None
        ),
        curve_of=result.history[-1].evaluated,
        batch_size=stored["recipe"]["batch_size"],
        threads=torch.get_num_threads(),
        precision=str(choose(config).precision).removeprefix("torch."),
        recipe=stored["recipe"],
        versions={"fastcifar": __version__, "torch": torch.__version__},
    )
