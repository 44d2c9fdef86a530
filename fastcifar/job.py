"""Job: one run, from its data to its result. `engine.fit` makes one and runs it.

Nothing in an epoch waits for the device; its sums are read once, at its end.

    Job(run, runtime, store, reporter, saved=None).train(stop)
"""

import contextlib
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastcifar import checkpoint, runs
from fastcifar.config import Tta
from fastcifar.data.store import ArrayStore
from fastcifar.errors import CheckpointError, ConfigError, DataError, DivergedError, OutputError, StoppedError
from fastcifar.evaluation import Evaluation, StopSeenError, eval_loader, evaluate, mistakes, test_stats
from fastcifar.loader import Loader
from fastcifar.metrics import EpochStats, LossNotFiniteError, TestStats, not_finite
from fastcifar.nets import build_model, count_parameters, prepare
from fastcifar.outcome import Pages, outcome
from fastcifar.page_worker import write_pages
from fastcifar.profiling import StepProfiler
from fastcifar.ranks import ALONE, Ranks
from fastcifar.recipes import augment_of, check_steps
from fastcifar.reporter import Reporter, RunResult
from fastcifar.runtime import ALONE_IN_PROCESS, Runtime, arithmetic, environment, is_compile_error, seed_everything
from fastcifar.signals import StopRequest
from fastcifar.step_graphs import StepGraphs, why_not
from fastcifar.summary import summarise
from fastcifar.trainer import Trainer, train_epoch
from fastcifar.whitening import first_convolution, first_images, whiten_

__all__ = ["FitResult", "Job"]

_LEAST_SCALE = 2.0**-20  # of float16 gradients: below, every update is lost


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A finished run: its folder, what each epoch did, and the result on the test images."""

    path: Path
    history: tuple[EpochStats, ...]
    test: TestStats
    run: RunResult


class Job:
    """One run, from its data to its result; of several ranks that make it together, the first writes them."""

    def __init__(
        self,
        run: runs.Run,
        rt: Runtime,
        store: ArrayStore,
        reporter: Reporter,
        saved: checkpoint.Checkpoint | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.run, self.rt, self.store, self.reporter, self.saved = run, rt, store, reporter, saved
        config, recipe = run.config, run.recipe
        schemes = sorted({scheme for scheme, part in (name.split("/") for name in store.split_names() if "/" in name)})
        if recipe.split not in schemes:
            raise ConfigError(f"split {recipe.split} is not one of {store.name}'s: choose from {', '.join(schemes)}")
        self.evaluated = "validation" if f"{recipe.split}/validation" in store.split_names() else "test"
        self.loader = Loader(
            store,
            split=f"{recipe.split}/train",
            batch_size=recipe.batch_size,
            seed=config.seed,
            augment=augment_of(recipe),
            scaling=recipe.scaling,
            device=rt.device,
            channels_last=config.channels_last,
            drop_last=recipe.drop_last,
            rank=ranks.rank,
            world_size=ranks.size,
        )
        if f"{recipe.split}/test" not in store.split_names():
            raise ConfigError(f"{store.name} has no test images in split {recipe.split!r}: convert it with a test part")
        check_steps(recipe, images=len(self.loader.dataset), steps=len(self.loader), ranks=ranks.size)
        self.eval_loader = eval_loader(store, f"{recipe.split}/{self.evaluated}", recipe, rt, ranks=ranks)
        steps = recipe.epochs * len(self.loader)
        with ALONE_IN_PROCESS:
            seed_everything(config.seed)
            model = build_model(config.arch, num_classes=len(store.classes), in_channels=store.image_shape[2])
        self.parameters = count_parameters(model)  # of the net as it is drawn: none is frozen yet
        started = time.perf_counter()
        if recipe.whiten != "none":
            convolution = first_convolution(model)
            if saved is None:  # else the checkpoint has the filters
                some = eval_loader(store, f"{recipe.split}/train", recipe, rt, shuffled=True)  # of all classes
                whiten_(convolution, first_images(some))
            convolution.weight.requires_grad_(recipe.whiten != "frozen")
        self.whiten_seconds = time.perf_counter() - started
        self.trainer = Trainer(model, recipe, rt, steps=steps, ranks=ranks)
        self.graphs: StepGraphs | None = None
        self._why_no_graphs = why_not(self.trainer, self.loader)
        if config.profile or not config.cuda_graphs:
            self._why_no_graphs = "--profile takes a step apart" if config.profile else "--no-cuda-graphs"
        if rt.device.type == "cuda":
            how = f"one operation after another: {self._why_no_graphs}" if self._why_no_graphs else "CUDA graphs"
            self.rt = rt = replace(rt, reasons=(*rt.reasons, ("steps", how)))
        self.saver = checkpoint.Saver(run.checkpoints)
        self.profiler = StepProfiler(
            run.path / "profile", rt.device, tell=reporter.message, enabled=config.profile and ranks.first
        )
        self.history: list[EpochStats] = []
        self.epoch = 0  # the running one, from 0
        self.elapsed = 0.0  # seconds of it before the run was stopped and resumed
        data = {"store": str(store.path), "digest": store.digest, "source": store.source}
        self.environment = {**environment(), "data": {**data, "verified": store.verified}}
        self.summary = summarise(
            run,
            rt,
            self.loader,
            self.eval_loader,
            evaluated=self.evaluated,
            parameters=self.parameters,
            steps=steps,
            saved=saved,
        )
        if saved is not None:
            self._restore(saved)

    def train(self, stop: StopRequest) -> FitResult:
        """Train what is left, then evaluate on the test images and write everything."""
        run, recipe, reporter = self.run, self.trainer.recipe, self.reporter
        if self.ranks.first:
            run.write(self.environment, resumed=self.saved is not None)
        try:
            reporter.start(self.summary, self.history)
            warmup_seconds = self.whiten_seconds + self._warm_up(stop)
            last = None
            while self.epoch < recipe.epochs:
                last = self._epoch(stop)
            found = last if last is not None and self._ends_in_test else self._evaluate("test", stop, tta=recipe.tta)
            self.saver.wait()
            result = self._finish(found, warmup_seconds)
        except StopSeenError as seen:
            self._save()
            self.saver.wait()
            self.ranks.tell("saved")  # torchrun signals the others as soon as one has ended: a second signal, to some
            raise StoppedError(
                f"stopped by {seen.signum.name} after step {self.trainer.step} of {self.trainer.steps}, saved; "
                f"{run.go_on()}",
                128 + seen.signum,
            ) from None
        finally:
            self.saver.close(wait=not isinstance(sys.exception(), KeyboardInterrupt))  # a second signal waits not
            reporter.close()
        return result

    @property
    def _ends_in_test(self) -> bool:
        """Whether the last epoch's evaluation is the test: of the test images, and of their own size."""
        side = self.trainer.resolution(self.trainer.steps - 1)
        return self.evaluated == "test" and (side is None or side >= min(self.store.image_shape[:2]))

    def _epoch(self, stop: StopRequest) -> Evaluation | None:
        recipe, trainer = self.trainer.recipe, self.trainer
        self.reporter.epoch_start(self.epoch + 1)
        started = time.perf_counter() - self.elapsed
        position = self.loader.state_dict()
        try:
            if position["epoch"] == self.epoch:  # else the run was stopped in this epoch's evaluation
                if position["step"] == 0:
                    trainer.start_epoch()
                with self.profiler as profiler:
                    taken = self.graphs.take_steps() if self.graphs is not None else None
                    train_epoch(trainer, self.loader, self.reporter, stop=stop, step_done=profiler.step, taken=taken)
            loss, accuracy, samples = trainer.totals.read()
        except LossNotFiniteError as lost:
            raise self._diverged(f"the training loss became {lost.loss}", lost.step) from None
        finally:
            self.elapsed = time.perf_counter() - started
        if not math.isfinite(loss):
            raise self._diverged(f"the training loss became {loss}", trainer.step)
        if trainer.scaler.is_enabled() and trainer.scaler.get_scale() < _LEAST_SCALE:
            raise self._diverged("gradients overflow at any scale", trainer.step)
        found = None
        if self.summary.is_evaluated(self.epoch + 1):
            is_test = self._ends_in_test and self.epoch + 1 == recipe.epochs
            size, tta = trainer.resolution(trainer.step - 1), recipe.tta if is_test else "none"
            found = self._evaluate(self.evaluated, stop, size=size, tta=tta)
        stats = EpochStats(
            epoch=self.epoch + 1,
            epochs=recipe.epochs,
            step=trainer.step,
            samples=samples,
            train_loss=loss,
            train_accuracy=accuracy,
            evaluated=self.evaluated,
            eval_loss=found.loss if found else None,
            eval_accuracy=found.accuracy if found else None,
            train_seconds=self.elapsed,
            eval_seconds=found.seconds if found else 0.0,
            images_per_second=samples / self.elapsed,
            learning_rate=trainer.learning_rate(trainer.step - 1),
        )
        self.history.append(stats)
        self.epoch += 1
        self.elapsed = 0.0
        self._save()
        self.reporter.epoch_end(stats)
        return found

    def _evaluate(self, part: str, stop: StopRequest, *, size: int | None = None, tta: Tta = "none") -> Evaluation:
        self.reporter.evaluate_start(part)
        loader = self.eval_loader
        if part != self.evaluated:
            split = f"{self.trainer.recipe.split}/{part}"
            loader = eval_loader(self.store, split, self.trainer.recipe, self.rt, ranks=self.ranks)
        with self.trainer.evaluating():
            return evaluate(self.trainer.model, loader, self.rt, size=size, tta=tta, stop=stop, ranks=self.ranks)

    def _warm_up(self, stop: StopRequest) -> float:
        """Compile what is compiled on first use; training times are free of it. Seconds taken."""
        started = time.perf_counter()
        images, size = len(self.loader.dataset), self.loader.batch_size
        last = [len(self.loader) - 1] * (images % size > 0 and not self.loader.drop_last)  # is short
        batches = [self.loader.batch(0, step) for step in dict.fromkeys([0, *last])]
        if self.rt.compile or self.rt.device.type == "cuda":
            evaluation = self.eval_loader.batch(0, 0).images
            try:
                # it may take minutes
                with ALONE_IN_PROCESS, stop.at_once(self.run.before_training(resumed=self.saved is not None)):
                    self.trainer.warm_up(batches, evaluation)
                    if self._why_no_graphs is None:
                        self.graphs = StepGraphs(self.trainer, self.loader)
            except Exception as error:
                if not is_compile_error(error):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(f"compile: the net cannot be compiled here ({reason}): use --compile off") from None
        else:
            prepare(self.trainer.model, self.rt.device, self.rt.precision)
        return time.perf_counter() - started

    def _diverged(self, what: str, step: int) -> DivergedError:
        bad = not_finite({**self.trainer.weights(), **self.trainer.tensors()})
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        inside = f"{bad[0]}{more} not finite" if bad else "all weights are finite still"
        where = f"at step {step} of {self.trainer.steps}, in epoch {(step - 1) // len(self.loader) + 1} ({inside})"
        with contextlib.suppress(OutputError):  # this run is lost either way
            self.saver.wait()
        kept = f"; the last good checkpoint is in {self.run.checkpoints}" if self.run.checkpoints.exists() else ""
        return DivergedError(f"{what} {where}: try a lower --lr{kept}")

    def _save(self) -> None:
        weights, training = self.trainer.weights(), self.trainer.tensors()
        if not_finite({**weights, **training}):
            raise self._diverged("the weights stopped being finite", self.trainer.step)
        if not self.ranks.first:
            return
        self.saver.save(
            step=self.trainer.step,
            model=weights,
            training=training,
            state={
                "config_hash": self.run.config_hash(),
                "arithmetic": arithmetic(self.rt),
                "fastcifar": self.environment["fastcifar"],
                "loader": self.loader.state_dict(),
                "epoch": self.epoch,
                "elapsed": self.elapsed,
                "history": [asdict(stats) for stats in self.history],
            },
        )

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        state = saved.state
        try:
            self.trainer.restore(saved.model, saved.training, saved.step)
            self.loader.load_state_dict(state["loader"])
            self.epoch, self.elapsed = int(state["epoch"]), float(state["elapsed"])
            self.history = [EpochStats(**values) for values in state["history"]]
            if len(self.history) != self.epoch or not all(stats.is_sound for stats in self.history):
                raise ValueError("its epochs are none")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CheckpointError(f"{saved.path} does not hold what a checkpoint does: {error!r}") from None

    def _finish(self, found: Evaluation, warmup_seconds: float) -> FitResult:
        run, history, classes = self.run, tuple(self.history), self.store.classes
        test = test_stats(found, classes)
        result = outcome(run, history, test, parameters=self.parameters, warmup_seconds=warmup_seconds)
        if self.ranks.first:
            wrong = None
            with contextlib.suppress(DataError):  # the store may be gone by now
                wrong = mistakes(found, self.store.split(f"{run.recipe.split}/test"), classes)
            environment, choices = self.environment, self.summary.choices
            write_pages(Pages(run, history, result, environment=environment, choices=choices, mistakes=wrong))
        self.reporter.finish(result)
        return FitResult(path=run.path, history=history, test=test, run=result)
