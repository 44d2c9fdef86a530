"""Trainer: a net, its optimiser and the sums of the running epoch; it makes steps, and saves and restores.

Example:
    trainer = Trainer(model, recipe, runtime, steps=100)
    trainer.step_no_sync(images, labels)      # floating [B, C, H, W], int64[B]
"""

import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcifar.config import Recipe
from fastcifar.errors import CheckpointError
from fastcifar.evaluation import StopSeenError, reduce
from fastcifar.loader import Batch, Loader
from fastcifar.metrics import Totals
from fastcifar.optim import build_optimizer, decay_no_sync, learning_rate, set_learning_rate
from fastcifar.reporter import Reporter
from fastcifar.runtime import Runtime, StopRequest

__all__ = ["Trainer", "train_epoch"]


class Trainer:
    """What a checkpoint holds, and the training step that moves it.

    Args:
        model: the net; moved to the runtime's device and memory format, and compiled where it says so.
        recipe: optimiser, schedule, loss.
        runtime: device, precision, layout.
        steps: in the whole run, for the schedule.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, runtime: Runtime, *, steps: int) -> None:
        self.model = model.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
        self.recipe = recipe
        self.runtime = runtime
        self.steps = steps
        self.step = 0  # done
        self.optimizer = build_optimizer(model, recipe)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.scale_gradients)
        self.totals = Totals(runtime.device)
        if runtime.compile:
            self.model.compile(dynamic=False)

    def start_epoch(self) -> None:
        """Begin to sum anew."""
        self.totals = Totals(self.runtime.device)

    def step_no_sync(self, images: Tensor, labels: Tensor, *, size: int | None = None) -> None:
        """One optimiser step on one batch.

        Args:
            images: floating [B, C, H, W].
            labels: int64[B], or float32[B, K] of mixed images.
            size: side in pixels to which the images are reduced first.
        """
        rate = self.learning_rate(self.step)
        set_learning_rate(self.optimizer, rate)
        logits, loss = self._loss(images, labels, size)
        torch.autograd.backward(self.scaler.scale(loss))
        decay_no_sync(self.optimizer, rate, self.recipe.weight_decay)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        # what is reported is free of label smoothing, as in evaluation; of mixed samples, the larger share counts
        labels = labels if labels.dim() == 1 else labels.argmax(1)
        self.totals.add_no_sync(F.cross_entropy(logits.detach(), labels, reduction="sum"), logits, labels)
        self.step += 1

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return learning_rate(self.recipe, step, self.steps)

    def warm_up(self, batches: Sequence[Batch], eval_images: Tensor, *, sizes: tuple[int | None, ...]) -> None:
        """Compile, and let the device choose its algorithms, for all shapes to come; the net is afterwards as it was.

        Args:
            batches: a training batch of each length.
            eval_images: floating [B, C, H, W], an evaluation batch.
            sizes: sides in pixels that training will run at; None for the images' own.
        """
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for size in sizes:
            for images, labels in batches:
                torch.autograd.backward(self._loss(images, labels, size)[1])
        self.optimizer.zero_grad()
        with torch.no_grad(), self.runtime.autocast():
            for size in {*sizes, None}:  # None: the test
                self.model.eval()(reduce(eval_images, size))
        self.model.train()
        self.model.load_state_dict(before)
        self.totals.read()  # waits for the device: the time taken is counted here

    def _loss(self, images: Tensor, labels: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
        images = reduce(images, size)
        with self.runtime.autocast():
            logits: Tensor = self.model(images)
        logits = logits.float()
        return logits, F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the net that the next step depends on, and the epoch's sums."""
        found = {f"metrics.{name}": tensor for name, tensor in self.totals.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        if self.runtime.scale_gradients:
            scale = self.scaler.state_dict()
            found["scaler.scale"] = torch.tensor(scale["scale"], dtype=torch.float64)
            found["scaler.growth"] = torch.tensor(scale["_growth_tracker"])
        return found

    def restore(self, model: Mapping[str, Tensor], training: Mapping[str, Tensor], step: int) -> None:
        """Take over what `model.state_dict()` and `tensors()` gave.

        Raises:
            CheckpointError: the tensors are of another net or optimiser; the first one is named.
        """
        own = self.model.state_dict()
        for name in sorted(own.keys() ^ model.keys()):
            raise CheckpointError(f"the checkpoint is of another net: {name} is only in one of them")
        for name, tensor in own.items():
            if tensor.shape != model[name].shape:
                shapes = f"{list(model[name].shape)} instead of {list(tensor.shape)}"
                raise CheckpointError(f"the checkpoint is of another net: {name} has shape {shapes}")
        self.model.load_state_dict(dict(model))
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, tensor in training.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                # in the parameter's own memory layout, so that the fused update stays fused
                like = parameters[int(index)]
                fits = tensor.shape == like.shape
                state.setdefault(int(index), {})[key] = torch.empty_like(like).copy_(tensor) if fits else tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.runtime.scale_gradients and "scaler.scale" in training:
            scaler = self.scaler.state_dict()
            scaler["scale"] = float(training["scaler.scale"])
            scaler["_growth_tracker"] = int(training["scaler.growth"])
            self.scaler.load_state_dict(scaler)
        self.totals.load_state_dict({name: training[f"metrics.{name}"] for name in self.totals.state_dict()})
        self.step = step


def train_epoch(
    trainer: Trainer, loader: Loader, reporter: Reporter, *, size: int | None, stop: StopRequest | None = None
) -> None:
    """Train from the loader's position to the end of its epoch.

    Args:
        trainer: moved by one step a batch.
        loader: the training data.
        reporter: told of each step.
        size: side in pixels to which the images are reduced; None for their own.
        stop: looked at after each step.
    """
    trainer.model.train()
    started, seen = time.perf_counter(), 0
    first, steps = int(loader.state_dict()["step"]), len(loader)
    for done, (images, labels) in enumerate(loader, first + 1):
        trainer.step_no_sync(images, labels, size=size)
        seen += len(labels)
        reporter.train_step(done, steps, seen / (time.perf_counter() - started))
        if stop is not None and stop.signum is not None:
            raise StopSeenError(stop.signum)
