"""Steps as CUDA graphs: what they do, without a GPU; that a GPU does it is `gpu/test_cuda.py`'s."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcifar import Augment, Loader, TrainConfig, build_model, open_store
from fastcifar.recipes import resolve
from fastcifar.reporter import NullReporter
from fastcifar.runtime import Runtime, choose
from fastcifar.step_graphs import StepGraphs, why_not
from fastcifar.trainer import Trainer, train_epoch

CONFIG = TrainConfig(arch="small", dataset="digits", recipe="fast", epochs=2, batch_size=200, device="cpu")


def trainer_and_loader(**options: Any) -> tuple[Trainer, Loader]:
    recipe = resolve(CONFIG)
    loader = Loader(
        open_store("digits"),
        batch_size=200,
        drop_last=True,
        augment=Augment(crop=2, flip="alternating"),
        **options,
    )
    torch.manual_seed(0)
    model = build_model("small", num_classes=10)
    return Trainer(model, recipe, choose(CONFIG), steps=2 * len(loader)), loader


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that run what they would have captured, after three steps of warm-up."""

    def captured(graphs: StepGraphs, sizes: dict[int | None, None]) -> dict[int | None, Any]:
        works = {size: graphs._work(size) for size in sizes}
        for work in works.values():
            for _ in range(3):
                work()
        return works

    monkeypatch.setattr(StepGraphs, "_captured", captured)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in {**trainer.weights(), **trainer.tensors()}.items()}


@pytest.mark.usefixtures("uncaptured")
def test_graphs_take_the_steps_of_the_loop() -> None:
    (eager, batches), (graphed, loader) = trainer_and_loader(), trainer_and_loader()
    graphs = StepGraphs(graphed, loader)
    for group in eager.optimizer.param_groups:
        group["lr"] = torch.zeros(())  # float32, as in a graph
    for epoch in range(2):
        for trainer, source, given in ((eager, batches, None), (graphed, loader, graphs)):
            trainer.start_epoch()
            train_epoch(trainer, source, NullReporter(), taken=given and given.take_steps())
        assert loader.state_dict() == batches.state_dict()
        assert loader.state_dict()["epoch"] == epoch + 1
        assert graphed.totals.read() == eager.totals.read()
    for (name, one), other in zip(weights(eager).items(), weights(graphed).values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.usefixtures("uncaptured")
def test_capturing_moves_nothing() -> None:
    trainer, loader = trainer_and_loader()
    train_epoch(trainer, loader, NullReporter())
    before = weights(trainer)
    StepGraphs(trainer, loader)
    assert trainer.step == len(loader)
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.usefixtures("uncaptured")
def test_a_graph_goes_on_from_any_position() -> None:
    seen = []
    trainer, loader = trainer_and_loader()
    trainer.move_no_sync = lambda images, labels, size: seen.append(images.clone()) or labels.float().mean()  # type: ignore[method-assign,assignment,func-returns-value]
    graphs = StepGraphs(trainer, loader)
    seen.clear()
    positions = ((0, 0), (0, 1), (1, 5), (1, 6), (0, 0))
    for position in positions:
        graphs.step_no_sync(*position)
    for position, images in zip(positions, seen, strict=True):
        assert torch.equal(images, loader.batch(*position).images)


def test_on_cuda_a_step_is_captured_but_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, loader = trainer_and_loader()
    monkeypatch.setattr(Loader, "counts_on_device", True)
    monkeypatch.setattr(trainer, "runtime", dataclasses.replace(trainer.runtime, device=torch.device("cuda")))
    assert why_not(trainer, loader) is None
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "ranks", SimpleNamespace(size=2))
        assert why_not(trainer, loader) == "several ranks wait for each other"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer", torch.optim.SGD(trainer.model.parameters(), lr=0.1))
        assert why_not(trainer, loader) == "the optimiser takes its learning rate from the host"
    short = Loader(open_store("digits"), batch_size=200)
    assert len(short.dataset) % 200
    assert why_not(trainer, short) == "the last batch is short"


def test_what_keeps_a_step_from_being_captured(tmp_path: Path) -> None:
    trainer, loader = trainer_and_loader()
    assert why_not(trainer, loader) == "CUDA graphs are CUDA's"

    def on_cuda(**changes: Any) -> Runtime:
        values = {"device": torch.device("cuda"), **changes}
        return dataclasses.replace(trainer.runtime, **values)

    cpu = trainer.runtime
    for changes, reason in (
        ({"scale_gradients": True}, "gradient scaling looks at each step's gradients"),
        ({}, "cpu batches are prepared on the host"),
    ):
        trainer.runtime = on_cuda(**changes)
        assert why_not(trainer, loader) == reason
        trainer.runtime = cpu
