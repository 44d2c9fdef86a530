"""What a run says of itself before its first step: choices, data, recipe, and what a person should know.

Example:
    summary = summarise(run, rt, train, evaluation, evaluated="test", parameters=10, steps=60, saved=None)
    reporter.start(summary, history=())
"""

from fastcifar.checkpoint import Checkpoint
from fastcifar.data.store import ArrayStore
from fastcifar.formats import things
from fastcifar.loader import Loader
from fastcifar.recipes import describe
from fastcifar.reporter import RunSummary
from fastcifar.runs import Run
from fastcifar.runtime import Runtime, arithmetic

__all__ = ["summarise"]

_FEW_STEPS = 50  # of a run, in which none of these nets learns much


def summarise(
    run: Run,
    rt: Runtime,
    train: Loader,
    evaluation: Loader,
    *,
    evaluated: str,
    parameters: int,
    steps: int,
    saved: Checkpoint | None,
) -> RunSummary:
    """What is known before the first step.

    Args:
        run: its options and recipe.
        rt: what was chosen for this machine.
        train: the training data.
        evaluation: the data of each epoch's evaluation.
        evaluated: what part they are.
        parameters: of the net.
        steps: of the whole run.
        saved: the checkpoint that the run goes on from.
    """
    store, recipe = train.store, run.recipe
    images = f"{len(train.dataset):,} training, {len(evaluation.dataset):,} {evaluated} images"
    copy = "" if store.verified else " (an unverified copy)"
    return RunSummary(
        title=run.title,
        choices=(
            *rt.reasons,
            ("placement", f"{train.placement_reason}; {train.backend} kernel"),
            ("data", f"{store.name}{copy}, split {recipe.split}: {images}"),
            ("recipe", f"{run.recipe_title}: {describe(recipe, side=min(store.image_shape[:2]))}"),
            ("net", f"{run.config.arch}, {parameters:,} parameters, seed {run.config.seed}"),
            ("run", str(run.path)),
        ),
        epochs=recipe.epochs,
        steps_per_epoch=len(train),
        evaluated=evaluated,
        eval_every=run.config.eval_every or 1,
        notices=(*(_resumed(saved, rt, steps) if saved else _about_steps(steps)), *_about(store)),
    )


def _resumed(saved: Checkpoint, rt: Runtime, steps: int) -> list[str]:
    notices = [*saved.skipped, f"resumed after step {saved.step} of {steps}"]
    before, now = saved.state.get("arithmetic", {}), arithmetic(rt)
    changed = [f"{name} {before[name]} became {now[name]}" for name in now if before.get(name) not in (None, now[name])]
    if changed:
        notices.append(f"{', '.join(changed)}: the run goes on, but not bit for bit")
    return notices


def _about(store: ArrayStore) -> list[str]:
    notices = []
    if not store.verified:
        notices.append("the data are an unverified copy: their checksum is not the published one")
    if len(store.classes) == 1:
        notices.append("the data have one class: there is nothing to tell apart")
    if store.name == "digits":
        notices.append("digits are a small stand-in; CIFAR-10: --dataset cifar10, fetched once, or --data FILE")
    return notices


def _about_steps(steps: int) -> list[str]:
    if steps >= _FEW_STEPS:
        return []
    return [f"{things(steps, 'step')} in all, few to learn in: more --epochs or a smaller --batch-size gives more"]
