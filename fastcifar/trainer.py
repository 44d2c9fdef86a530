"""Trainer: a net, its optimiser and the sums of the running epoch; it makes steps, and saves and restores.

Example:
    trainer = Trainer(model, recipe, runtime, steps=100)
    trainer.step_no_sync(images, labels)      # floating [B, C, H, W], int64[B]
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastcifar.averaging import Averaging
from fastcifar.config import Recipe
from fastcifar.errors import CheckpointError
from fastcifar.evaluation import StopSeenError, reduce
from fastcifar.loader import Batch, Loader
from fastcifar.metrics import LossWatch, Totals
from fastcifar.optim import build_optimizer, learning_rate, resolution, set_learning_rate
from fastcifar.profiling import phase_scope, scoped_batches
from fastcifar.rank_norm import share_norms
from fastcifar.ranks import ALONE, Ranks
from fastcifar.reporter import Reporter
from fastcifar.runtime import Runtime
from fastcifar.signals import StopRequest

__all__ = ["Trainer", "load_weights", "train_epoch"]

_NAMED = 3
"""Tensors of another net that are named."""

_SKIPS = 50
"""Steps in a row that gradient scaling may skip: each halves the scale, which starts at 2**16."""


class Trainer:
    """What a checkpoint holds, and the training step that moves it.

    Args:
        model: the net; moved to the runtime's device and memory format, and compiled where it says so.
        recipe: optimiser, schedules, loss, averaging, and the momentum of every BatchNorm.
        runtime: device, precision, layout.
        steps: in the whole run, for the schedules.
        ranks: that take each step together, each on its part of the batch. All begin with the first's net.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, runtime: Runtime, *, steps: int, ranks: Ranks = ALONE) -> None:
        share_norms(model, ranks)
        self.model = model.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]
        self.recipe = recipe
        self.runtime = runtime
        self.ranks = ranks
        self.steps = steps
        self.step = 0  # done
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = recipe.norm_momentum
        ranks.copy_first_no_sync(self.model.state_dict().values())
        self.optimizer = build_optimizer(model, recipe, precision=runtime.precision)
        self.averaging = Averaging(model, recipe, steps=steps)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.scale_gradients)
        self.watch = LossWatch(_SKIPS if runtime.scale_gradients else 1)
        self.totals = Totals(runtime.device, lenient=runtime.scale_gradients, everywhere=ranks.sum_no_sync)
        if runtime.compile:
            self.model.compile(dynamic=False)

    def start_epoch(self) -> None:
        """Begin to sum anew."""
        self.totals.reset()

    def step_no_sync(self, images: Tensor, labels: Tensor) -> None:
        """One optimiser step on one batch, or on this rank's part of it.

        Args:
            images: floating [B, C, H, W].
            labels: int64[B], or float32[B, K] of mixed images.

        Raises:
            LossNotFiniteError: on a CPU, where looking costs no waiting; no parameter was changed by this step.
        """
        self.begin_step_no_sync()

        def look(loss: Tensor) -> None:
            self.watch.add_no_sync(self.step + 1, loss)
            if loss.device.type == "cpu":
                self.watch.check()

        self.move_no_sync(images, labels, self.resolution(self.step), look=look)
        self.end_step_no_sync()

    def begin_step_no_sync(self) -> None:
        """What `move_no_sync` does not do, before it: the learning rate."""
        set_learning_rate(self.optimizer, self.learning_rate(self.step))

    def end_step_no_sync(self) -> None:
        """What `move_no_sync` does not do, after it: averaging, in some steps, and counting."""
        self.averaging.update_no_sync(self.step + 1)
        self.step += 1

    def move_no_sync(
        self, images: Tensor, labels: Tensor, size: int | None, *, look: Callable[[Tensor], None] = lambda loss: None
    ) -> Tensor:
        """What all steps do alike, on the device alone: a CUDA graph may hold it.

        Args:
            images: floating [B, C, H, W].
            labels: int64[B], or float32[B, K] of mixed images.
            size: side in pixels to which the images are reduced first; None for their own.
            look: is given the loss before anything is changed.

        Returns:
            The loss, floating [].
        """
        logits, loss = self._loss(images, labels, size)
        loss, own = self.ranks.share_loss_no_sync(loss, len(labels))
        look(loss)
        with phase_scope("backward"):
            torch.autograd.backward(self.scaler.scale(own))
            self.ranks.sum_gradients_no_sync(self.model.parameters())
        with phase_scope("optimiser"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        # what is reported is free of label smoothing, as in evaluation; of mixed samples, the larger share counts
        with phase_scope("totals"):
            labels = labels if labels.dim() == 1 else labels.argmax(1)
            self.totals.add_no_sync(logits, labels)
        return loss.detach()

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return learning_rate(self.recipe, step, self.steps)

    def resolution(self, step: int) -> int | None:
        """The side in pixels to which step `step`, from 0, reduces the images; None for their own."""
        return resolution(self.recipe, step, self.steps)

    def evaluating(self) -> AbstractContextManager[None]:
        """Within the block `model` is the net to evaluate: its average where the recipe averages."""
        return self.averaging.swapped()

    def warm_up(self, batches: Sequence[Batch], eval_images: Tensor) -> None:
        """Compile, and have the device load what it needs, for all shapes to come; the net is afterwards as it was.

        Args:
            batches: a training batch of each length.
            eval_images: floating [B, C, H, W], an evaluation batch.
        """
        ahead = dict.fromkeys(self.resolution(step) for step in range(self.step, self.steps))
        with self.unmoved():
            for size in ahead:
                for images, labels in batches:
                    torch.autograd.backward(self._loss(images, labels, size)[1])
            self.optimizer.zero_grad()
            with torch.no_grad(), self.runtime.autocast():
                # the last step's too: the run may have been stopped in its epoch's evaluation; None: the test
                for size in dict.fromkeys((self.resolution(max(self.step - 1, 0)), *ahead, None)):
                    self.model.eval()(reduce(eval_images, size))
            self.model.train()

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """For a block after which net, optimiser and sums are as they were, in the same tensors. Waits for the device.

        What the optimiser has made in the block, its momentum, is zero.
        """
        momenta = self._momenta()
        held = [*self.model.state_dict().values(), *self.totals.sums, *momenta]
        values = [tensor.clone() for tensor in held]
        yield
        with torch.no_grad():
            for tensor, value in zip(held, values, strict=True):
                tensor.copy_(value)
            for tensor in self._momenta()[len(momenta) :]:  # a dict keeps its order
                tensor.zero_()
        self.totals.read()  # waits: the time taken is counted here

    def _momenta(self) -> list[Tensor]:
        return [value for state in self.optimizer.state.values() for value in state.values()]

    def _loss(self, images: Tensor, labels: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
        with phase_scope("resolution"):
            images = reduce(images, size)
        with phase_scope("forward"), self.runtime.autocast():
            logits: Tensor = self.model(images)
        with phase_scope("loss"):
            logits = logits.float()
            return logits, F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)

    def weights(self) -> dict[str, Tensor]:
        """The state of the net to evaluate, as `evaluating` has it."""
        return {**self.model.state_dict(), **self.averaging.averages()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything but `weights` that the next step depends on, and the epoch's sums."""
        found = {f"metrics.{name}": tensor for name, tensor in self.totals.state_dict().items()}
        found |= self.averaging.tensors()
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        if self.runtime.scale_gradients:
            scale = self.scaler.state_dict()
            found["scaler.scale"] = torch.tensor(scale["scale"], dtype=torch.float64)
            found["scaler.growth"] = torch.tensor(scale["_growth_tracker"])
        return found

    def restore(self, weights: Mapping[str, Tensor], training: Mapping[str, Tensor], step: int) -> None:
        """Take over what `weights()` and `tensors()` gave.

        Raises:
            CheckpointError: the tensors are of another net; the first one is named.
        """
        load_weights(self.model, weights)
        self.averaging.restore(training)
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
        sums = {name: training[f"metrics.{name}"] for name in self.totals.state_dict()}
        if self.ranks.first:  # they are all ranks' together
            self.totals.load_state_dict(sums)
        self.step = step


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's net.

    Raises:
        CheckpointError: the tensors are of another net; the first few are named.
    """
    own = model.state_dict()
    wrong = [f"{name} is only in one of them" for name in sorted(own.keys() ^ weights.keys())]
    wrong += [
        f"{name} has shape {list(weights[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and tensor.shape != weights[name].shape
    ]
    if wrong:
        more = f", and {len(wrong) - _NAMED} more differ" if len(wrong) > _NAMED else ""
        raise CheckpointError(f"the checkpoint is of another net: {', '.join(wrong[:_NAMED])}{more}")
    model.load_state_dict(dict(weights))


def train_epoch(
    trainer: Trainer,
    loader: Loader,
    reporter: Reporter,
    *,
    stop: StopRequest | None = None,
    step_done: Callable[[], None] = lambda: None,
    taken: Iterable[None] | None = None,
) -> None:
    """Train from the loader's position to the end of its epoch.

    Args:
        trainer: moved by one step a batch.
        loader: the training data.
        reporter: told of each step.
        stop: looked at after each step.
        step_done: called after each step; `StepProfiler.step` takes ten of them apart.
        taken: takes a step when it is asked for one, as `StepGraphs` does; None: `step_no_sync` takes them.

    Raises:
        LossNotFiniteError: the loss is no longer finite; where looking would wait for the device, at the end.
        StopSeenError: `stop` was asked for.
    """
    trainer.model.train()
    started, signum = time.perf_counter(), None
    first, steps, images_in_all = int(loader.state_dict()["step"]), len(loader), len(loader.dataset)
    for done, _ in enumerate(_take_steps(trainer, loader) if taken is None else taken, first + 1):
        seen = min(done * loader.batch_size, images_in_all) - first * loader.batch_size
        reporter.train_step(done, steps, seen / (time.perf_counter() - started))
        step_done()
        if signum := trainer.ranks.asked(stop):
            break
    trainer.watch.check()
    if signum is not None:
        raise StopSeenError(signum)


def _take_steps(trainer: Trainer, loader: Loader) -> Iterator[None]:
    for images, labels in scoped_batches(loader):
        trainer.step_no_sync(images, labels)
        yield
