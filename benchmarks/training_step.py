"""What does a training step cost beside its convolutions and matrix products, and what does making its batch cost?

    python -m benchmarks.training_step [--only WORD] [--seconds 0.3] [--repeats 11]

For each net and batch size, in float32 and, where the CPU has units for it, as --amp does in bfloat16; in turn in one
process, recipe fast, channels-last:

- step: as in an epoch, on batches that the loader makes (32x32 pixels);
- same batch: the same step on one batch, again and again; what the first takes longer is input and bookkeeping;
- bare: the net's convolutions and matrix products alone, forward and backward, on tensors of the same shapes and
  types, by PyTorch's own operators: where ours are faster, the step is faster than these;
- reduced: the step on one batch, reduced to 20x20 pixels first;
- batches: the loader alone.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import alternate, save, summary
from benchmarks.images import noise
from benchmarks.scaling import MemoryStore
from fastcifar import Loader, TrainConfig, build_model
from fastcifar.config import Recipe
from fastcifar.loader import Batch
from fastcifar.memory import keep_freed
from fastcifar.nets import ARCHS
from fastcifar.profiling import scoped_batches
from fastcifar.recipes import RECIPES
from fastcifar.runtime import Runtime, choose
from fastcifar.trainer import Trainer

BATCH_SIZES = (64, 250)
REDUCED = 20
_STEPS = 1_000_000
"""In the run that the steps are taken from: the learning rate hardly rises, and weights of noise stay finite."""


def bare_work(model: nn.Module, images: Tensor) -> list[Callable[[], tuple[Tensor | None, ...]]]:
    """Forward and backward of each convolution and matrix product of `model`, with no more than a step needs.

    Args:
        model: one of our nets, in train mode. Under autocast its layers compute in another type, and so does the work.
        images: floating [B, C, H, W], channels-last. Nothing needs their gradient, so the first layer's is left out.

    Returns:
        For each layer a function that computes its output, and the gradients of its input and its weight.
    """
    found: list[Callable[[], tuple[Tensor | None, ...]]] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        wanted = [inputs[0].requires_grad, layer.weight.requires_grad]
        # copies keep the memory layout
        given, weight = (tensor.detach().to(output.dtype, copy=True) for tensor in (inputs[0], layer.weight))
        gradient = torch.randn_like(output.detach())
        if isinstance(layer, nn.Conv2d):
            found.append(_convolution(layer, given, weight, gradient, wanted))
        else:
            found.append(_product(given, weight, gradient, wanted))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    fused = model.fused
    model.fused = False  # type: ignore[assignment]  # a net of ours calls each module then
    model(images)
    model.fused = fused
    for hook in hooks:
        hook.remove()
    return found


def _convolution(
    layer: nn.Conv2d, given: Tensor, weight: Tensor, gradient: Tensor, wanted: list[bool]
) -> Callable[[], tuple[Tensor | None, ...]]:
    where = (layer.stride, layer.padding, layer.dilation)

    def run() -> tuple[Tensor | None, ...]:
        output = F.conv2d(given, weight, None, *where, layer.groups)
        found = torch.ops.aten.convolution_backward(
            gradient, given, weight, None, *where, False, [0, 0], layer.groups, [*wanted, False]
        )
        return output, found[0], found[1]

    return run


def _product(
    given: Tensor, weight: Tensor, gradient: Tensor, wanted: list[bool]
) -> Callable[[], tuple[Tensor | None, ...]]:
    def run() -> tuple[Tensor | None, ...]:
        for_input = torch.mm(gradient, weight) if wanted[0] else None
        for_weight = torch.mm(gradient.t(), given) if wanted[1] else None
        return torch.mm(given, weight.t()), for_input, for_weight

    return run


def speed(work: Callable[[], object], images: int, seconds: float) -> Callable[[], float]:
    """A measurement: images a second of `work`, which does `images` of them, again and again."""

    def measure() -> float:
        done, started = 0, time.perf_counter()
        while True:
            work()
            done += images
            if (took := time.perf_counter() - started) >= seconds:
                return done / took

    return measure


def contestants(
    arch: str, loader: Loader, recipe: Recipe, runtime: Runtime, seconds: float
) -> dict[str, Callable[[], float]]:
    """What races, by name; images a second each."""
    trainers = [
        Trainer(
            build_model(arch, num_classes=10), dataclasses.replace(recipe, resolutions=stages), runtime, steps=_STEPS
        )
        for stages in ((), ((REDUCED, 1.0),))
    ]
    for trainer in trainers:
        trainer.model.train()
    images, labels = loader.batch(0, 0)
    with runtime.autocast():
        layers = bare_work(trainers[0].model, images)
    batches = _endless(loader)

    def bare() -> None:
        for layer in layers:
            layer()

    works: dict[str, Callable[[], object]] = {
        "step": lambda: trainers[0].step_no_sync(*next(batches)),
        "same batch": lambda: trainers[0].step_no_sync(images, labels),
        "bare": bare,
        "reduced": lambda: trainers[1].step_no_sync(images, labels),
        "batches": lambda: next(batches),
    }
    return {name: speed(work, loader.batch_size, seconds) for name, work in works.items()}


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from scoped_batches(loader)


def shares(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Ratios of the rounds' speeds, round by round, since what disturbs a round disturbs all of it.

    Returns:
        "input": what the loader's batches add to the same step's time, as a fraction of it;
        "batches": the time of making a batch, as a fraction of the step's;
        "of bare": the step's speed as a fraction of that of its convolutions and products alone;
        "reduced": how many times faster the step is on reduced images.
    """
    step, same, bare, reduced, batches = (
        results[name]["rounds"] for name in ("step", "same batch", "bare", "reduced", "batches")
    )
    return {
        "input": summary([b / a - 1 for a, b in zip(step, same, strict=True)]),
        "batches": summary([a / b for a, b in zip(step, batches, strict=True)]),
        "of bare": summary([a / b for a, b in zip(step, bare, strict=True)]),
        "reduced": summary([a / b for a, b in zip(reduced, same, strict=True)]),
    }


def main(arguments: list[str]) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="nets whose name has this word")
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", default="training_step", help="name of the file in benchmarks/results")
    options = parser.parse_args(arguments)
    archs = [name for name in ARCHS if options.only in name]
    if not archs:
        parser.error(f"--only {options.only}: choose from {', '.join(ARCHS)}")
    if options.only and options.out == parser.get_default("out"):
        parser.error(f"--only needs --out NAME: {options.out}.json keeps all nets")
    store, recipe = MemoryStore(noise(50_000, 32)), RECIPES["fast"]
    keep_freed()  # as `fit` does
    runtimes = {
        runtime.precision: runtime for runtime in (choose(TrainConfig(device="cpu", amp=amp)) for amp in (False, True))
    }
    results = []
    for arch, batch_size, runtime in itertools.product(archs, BATCH_SIZES, runtimes.values()):
        precision = str(runtime.precision).removeprefix("torch.")
        title = f"{arch}, batch {batch_size}, {precision}"
        loader = Loader(store, batch_size=batch_size, augment=recipe.augment, scaling=recipe.scaling, drop_last=True)
        torch.manual_seed(0)
        raced = alternate(contestants(arch, loader, recipe, runtime, options.seconds), repeats=options.repeats)
        if failed := next((result["failed"] for result in raced.values() if "failed" in result), None):
            raise SystemExit(f"{title}: {failed}")
        about = {"arch": arch, "batch_size": batch_size, "precision": precision}
        results.append({**about, "raced": raced, "shares": shares(raced)})
        for name, result in raced.items():
            print(f"{title}: {result['median']:10,.1f} +- {result['interval95']:8,.1f} images/s  {name}")
        for name, share in results[-1]["shares"].items():
            print(f"{title}: {share['median']:10.4f} +- {share['interval95']:8.4f}           {name}")
    more = {"recipe": dataclasses.asdict(recipe), "reduced": REDUCED}
    print(f"written to {save(options.out, (__doc__ or '').splitlines()[0], results, **more)}")


if __name__ == "__main__":
    main(sys.argv[1:])
