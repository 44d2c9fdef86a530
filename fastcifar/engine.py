"""The training loop: `fit` takes a config to a trained, saved, explained net.

Nothing in an epoch waits for the device; its sums are read once, at its end.

    result = fit(TrainConfig(arch="small", dataset="digits", epochs=2))
    result.test.accuracy
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from fastcifar import checkpoint, memory, runs, runtime, signals
from fastcifar.checks import check_kind
from fastcifar.config import Recipe, TrainConfig
from fastcifar.data.datasets import DATASETS, open_store, set_aside
from fastcifar.data.store import ArrayStore
from fastcifar.errors import CheckpointError, ConfigError, DamagedStoreError, DataError, FastcifarError, RankLostError
from fastcifar.evaluation import eval_loader, evaluate, test_stats
from fastcifar.job import FitResult, Job
from fastcifar.metrics import TestStats
from fastcifar.nets import check_image_size, find_arch, prepare
from fastcifar.publish import read_file
from fastcifar.ranks import Ranks, joined
from fastcifar.recipes import resolve
from fastcifar.reporter import JsonLinesReporter, NullReporter, Reporter, TeeReporter
from fastcifar.several import holds_several, members
from fastcifar.trained import find_run, net_of, newest_of
from fastcifar.trainer import train_epoch

__all__ = [
    "FitResult",
    "check_options",
    "evaluate",
    "evaluate_run",
    "find_data",
    "fit",
    "open_data",
    "train_epoch",
]


def fit(config: TrainConfig, *, reporter: Reporter | None = None, complete: bool = False) -> FitResult:
    """Train as `config` says and write the run's folder; with `config.resume`, go on with a stopped run.

    Under torchrun the processes train together, each on a part of every batch: the run is that of one process, but for
    rounding. The first of them writes and reports.

    Args:
        config: the options.
        reporter: hears how it goes; None for silence. metrics.jsonl is written either way.
        complete: whether every option of a `config` that resumes was asked for; else those at their default were not,
            and are the stopped run's.

    Raises:
        ConfigError, DataError, OutputError, CheckpointError: before training, each with one clear line.
        DivergedError: the loss stopped being finite; the last good checkpoint is kept.
        StoppedError: SIGINT, SIGTERM or SIGHUP came; a checkpoint was written first, but before the first step.
        RankLostError: another of the processes under torchrun has ended; the last checkpoint is kept.
    """
    check_kind("config", config, TrainConfig, "a TrainConfig")
    with signals.catch_stop() as stop, joined(config.device, stop) as ranks:
        heard = TeeReporter((reporter if ranks.first else None) or NullReporter())  # which stops no run
        return _fit(config, heard, stop, ranks, complete=complete)


def _fit(
    config: TrainConfig, reporter: Reporter, stop: signals.StopRequest, ranks: Ranks, *, complete: bool
) -> FitResult:
    config = _after_restart(config, ranks)
    resumed = runs.reopen(config.resume, config, complete=complete) if config.resume is not None else None
    config = resumed.config if resumed else config
    recipe = resumed.recipe if resumed else resolve(config)
    check_options(config, recipe)
    rt = runtime.choose(config, ranks)
    run = resumed or _create(config, recipe, ranks)
    if rt.device.type == "cpu":
        memory.keep_freed()
    with run.claimed(new=resumed is None) if ranks.first else contextlib.nullcontext():
        saved = checkpoint.load_newest(run.checkpoints) if resumed else None
        if saved is not None and (step := ranks.tell(str(saved.step))) != str(saved.step):
            raise CheckpointError(f"{saved.path} is not the checkpoint of step {step}, which the first rank found")
        try:
            with _or_nothing(run) if ranks.first else contextlib.nullcontext(), _enough_memory(rt):
                return _train(run, rt, saved, reporter, stop, ranks)
        except RankLostError as error:
            if not ranks.first:
                raise
            kept = f"; {run.go_on()}" if checkpoint.saved(run.checkpoints) else "; nothing was saved"
            raise RankLostError(f"{error}{kept}") from None


@contextlib.contextmanager
def _enough_memory(rt: runtime.Runtime) -> Iterator[None]:
    """For a block that says so where the device has too little."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (reason := runtime.out_of_memory(error)) is None:
            raise
        raise FastcifarError(f"{rt.device} has too little memory ({reason}): try a smaller --batch-size") from None


@contextlib.contextmanager
def _or_nothing(run: runs.Run) -> Iterator[None]:
    """For a block after whose failure nothing of the run may be left, unless something was saved."""
    try:
        yield
    except BaseException:
        run.discard()
        raise


def _create(config: TrainConfig, recipe: Recipe, ranks: Ranks) -> runs.Run:
    """The folder of a new run, which the first rank makes."""
    if ranks.may_restart and config.out is None:
        raise ConfigError("out must be given where torchrun may restart the ranks: by it the run is found again")
    if not ranks.first:
        return runs.Run(path=Path(ranks.tell("")), config=config, recipe=recipe)
    run = runs.create(config, recipe)
    with _or_nothing(run):
        ranks.tell(str(run.path))
    return run


def _after_restart(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The options with which torchrun's restart goes on: from the newest checkpoint, or from the beginning."""
    if config.out is None or not ranks.restarted:
        return config
    if ranks.first:
        runs.clear_unsaved(config)
    found = ranks.tell("saved" if ranks.first and checkpoint.saved(config.out / "checkpoints") else "")
    return dataclasses.replace(config, out=None, resume=config.out) if found else config


def _train(
    run: runs.Run,
    rt: runtime.Runtime,
    saved: checkpoint.Checkpoint | None,
    reporter: Reporter,
    stop: signals.StopRequest,
    ranks: Ranks,
) -> FitResult:
    def job(store: ArrayStore) -> Job:
        # first: what it cannot keep is not announced
        record = JsonLinesReporter(run.path / "metrics.jsonl") if ranks.first else NullReporter()
        return Job(run, rt, store, TeeReporter(record, reporter), saved, ranks)

    if saved is not None:
        run.check(saved)
    with stop.at_once(run.before_training(resumed=saved is not None)):
        store = find_data(run.config, run.path, reporter)
        try:
            made = job(store)
        except DamagedStoreError as error:  # its bytes are checked when they are first copied
            if ranks.size > 1 or not set_aside(store, error):
                raise
            made = job(open_data(run.config, reporter))
    try:
        return made.train(stop)
    except DamagedStoreError as error:  # of a store that stays on disk they are checked on the way
        if ranks.first and set_aside(made.store, error):
            raise DataError(f"{error.found}; the store is set aside, to be made anew: {run.go_on()}") from None
        raise


@signals.stop_at_once("before the evaluation was done; the run is as it was")
def evaluate_run(
    path: Path | str, *, device: str = "auto", data: Path | None = None, reporter: Reporter | None = None
) -> TestStats:
    """Evaluate a run's newest checkpoint on the test images.

    Args:
        path: the run's folder.
        device: as in `TrainConfig`.
        data: where its store is now, or the data set's archive; None for where they were.
        reporter: hears which checkpoint it is, and of those that had to be skipped.

    Raises:
        CheckpointError: `path` is not a run, or it has no sound checkpoint.
        DataError: its data cannot be opened.
    """
    reporter, run = TeeReporter(reporter or NullReporter()), find_run(path)
    if data is not None:
        if not Path(data).exists():
            raise DataError(f"{data}: does not exist")
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    rt = runtime.choose(dataclasses.replace(run.config, device=device, compile="off"))  # one pass: compiling costs more
    saved = newest_of(run, reporter.message)
    done = int(saved.state.get("epoch", 0))
    unfinished = ": the run is not finished" * (done < run.recipe.epochs)
    reporter.message(f"checkpoint of step {saved.step}, after {done} of {run.recipe.epochs} epochs{unfinished}")
    store = find_data(run.config, run.path, reporter)
    try:
        return _tested(run, rt, saved, store)
    except DamagedStoreError as error:  # its bytes are checked when they are first read
        if not set_aside(store, error):
            raise
        return _tested(run, rt, saved, open_data(run.config, reporter))


def _tested(run: runs.Run, rt: runtime.Runtime, saved: checkpoint.Checkpoint, store: ArrayStore) -> TestStats:
    """What a checkpoint's net makes of the test images.

    Raises:
        CheckpointError: it is of other data.
        DamagedStoreError: the store is.
    """
    if store.digest != saved.state.get("loader", {}).get("digest"):
        raise CheckpointError(f"{saved.path} was trained on other data than {store.path} holds")
    model = net_of(run, saved, rt.device)
    prepare(model, rt.device, rt.precision)
    loader = eval_loader(store, f"{run.recipe.split}/test", run.recipe, rt)
    with _enough_memory(rt):
        return test_stats(evaluate(model, loader, rt, tta=run.recipe.tta), store.classes)


def check_options(config: TrainConfig, recipe: Recipe) -> None:
    """Refuse what no data could be trained with.

    Raises:
        ConfigError: there is no such net, or the nets take no images of the recipe's sizes.
    """
    find_arch(config.arch)
    for side, _ in recipe.resolutions:
        check_image_size(side, side)


def find_data(config: TrainConfig, path: Path, reporter: Reporter) -> ArrayStore:
    """The store that a run was begun with, or others of its series, where it was or where `data` says.

    Without any of these, or if that is gone, it is the one that `config` names.

    Args:
        config: the run's options.
        path: its folder.
        reporter: hears of a store that is another.

    Raises:
        ConfigError, DataError: it is none of these, or cannot be had.
    """
    begun = _recorded(path) or next(filter(None, map(_recorded, _others_of_series(path, config))), None)
    if begun is None:
        return open_data(config, reporter)
    recorded, digest = begun
    reasons = []
    for place in filter(None, (config.data, recorded)):
        try:
            store = ArrayStore(place)
            if store.digest == digest:
                return store
            reporter.message(f"{place} holds other data than the run's: it is not used")
        except DataError as error:
            reasons.append(str(error))
    if config.dataset in DATASETS:
        return open_data(config, reporter)
    why = f" ({'; '.join(reasons)})" * bool(reasons)
    raise DataError(f"{recorded} is not the store that it was: put it back, or name its new place with --data{why}")


def _recorded(run: Path) -> tuple[Path, str] | None:
    """Where the store of the run in that folder was, and its digest; None where its environment.json does not say."""
    try:
        data = json.loads(read_file(run / "environment.json"))["data"]
        return Path(data["store"]), str(data["digest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _others_of_series(run: Path, config: TrainConfig) -> list[Path]:
    """The folders of the runs that belong with the one in that folder: in its series, and of the same data."""
    for series in (run.parent, run.parent.parent):
        if holds_several(series) and runs.reopen(series).config.dataset == config.dataset:
            return members(series)
    return []


def open_data(config: TrainConfig, reporter: Reporter) -> ArrayStore:
    """The store that `config` names; what isn't there yet is fetched and converted.

    Raises:
        ConfigError, DataError: it cannot be had, or the nets cannot take its images.
    """
    dataset = runs.dataset_name(config)
    with (
        reporter.transfer(f"fetching {dataset}", "bytes") as fetching,
        reporter.transfer(f"converting {dataset}", "images") as converting,
    ):
        store = open_store(
            config.dataset,
            data=config.data,
            allow_unverified=config.allow_unverified,
            fetch_progress=fetching,
            convert_progress=converting,
        )
    check_image_size(*store.image_shape[:2])
    return store
