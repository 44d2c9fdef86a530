"""Several ranks do together what one does alone: norms, steps, sums and evaluations."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastcifar import runtime
from fastcifar.config import Recipe, TrainConfig
from fastcifar.data.store import ArrayStore
from fastcifar.errors import ConfigError
from fastcifar.evaluation import eval_loader, evaluate
from fastcifar.kernels.plan import rank_part
from fastcifar.loader import Loader
from fastcifar.nets import build_model
from fastcifar.rank_norm import share_norms
from fastcifar.ranks import ALONE, Ranks, asked_for, joined
from fastcifar.recipes import RECIPES
from fastcifar.signals import StopRequest
from fastcifar.trainer import Trainer
from tests.faults import tiny_runs
from tests.ranked import environment, together

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("shape", [(13, 4), (13, 4, 5, 3)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_norm_over_ranks_is_the_norm_over_the_whole_batch(
    tmp_path: Path, shape: tuple[int, ...], kind: torch.dtype
) -> None:
    torch.manual_seed(0)
    values, upstream = (5 + 3 * torch.randn(shape)).to(kind), torch.randn(shape).to(kind)
    make = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d

    def norm(ranks: Ranks) -> dict[str, Tensor]:
        torch.manual_seed(1)
        net = nn.Sequential(make(4, momentum=0.3))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.uniform_(0.5, 2)
        names = list(net.state_dict())
        share_norms(net, ranks)
        assert list(net.state_dict()) == names
        part = slice(*rank_part(shape[0], ranks.rank, ranks.size))
        own = values[part].clone().requires_grad_()
        found = net(own)
        found.backward(upstream[part])
        gradients = ranks.sum_no_sync([parameter.grad for parameter in net.parameters()])  # type: ignore[misc]
        net.eval()
        later = net(values)
        return {
            "found": found,
            "input": own.grad,  # type: ignore[dict-item]
            "later": later,
            "parameters": torch.cat(gradients),
            "running": torch.cat([net[0].running_mean, net[0].running_var]),  # type: ignore[list-item]
            "count": net[0].num_batches_tracked,  # type: ignore[dict-item]
        }

    alone = norm(ALONE)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if kind == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for size in (2, 3):
        results = together(size, norm, tmp_path)
        for name in ("found", "input"):
            torch.testing.assert_close(torch.cat([each[name] for each in results]), alone[name], **tolerance)
        for name in ("later", "parameters", "running", "count"):
            for each in results:
                torch.testing.assert_close(each[name], alone[name], **tolerance)
                assert torch.equal(each[name], results[0][name]), "ranks must not drift apart"


def test_a_norm_of_no_image_or_table_is_refused(tmp_path: Path) -> None:
    def norm(ranks: Ranks) -> dict[str, Tensor]:
        net = nn.Sequential(nn.BatchNorm1d(4))
        share_norms(net, ranks)
        with pytest.raises(ValueError, match=r"expected \[B, C\]"):
            net(torch.ones(2, 4, 3))
        return {}

    together(2, norm, tmp_path)


def recipe(**changes: object) -> Recipe:
    given = {"split": "report", "optimizer": "sgd", "lr": 0.1, "batch_size": 13, "schedule": "constant"}
    return dataclasses.replace(RECIPES["report"], **{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("first", [0, 3])  # the last batch of an epoch has 9 of 48 images
def test_a_step_is_that_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, first: int) -> None:
    tiny_runs.prepare(monkeypatch, tmp_path)
    store = ArrayStore(tmp_path / "data")
    chosen = runtime.choose(TrainConfig(device="cpu"))
    how = recipe(label_smoothing=0.1, resolutions=((17, 0.5),))

    def train(ranks: Ranks) -> dict[str, Tensor]:
        loader = Loader(
            store, split="report/train", batch_size=13, scaling="standardize", rank=ranks.rank, world_size=ranks.size
        )
        torch.manual_seed(ranks.rank)  # the first's net is everyone's
        model = build_model("tiny", num_classes=3).double()  # in which no step is chaotic
        trainer = Trainer(model, how, chosen, steps=len(loader), ranks=ranks)
        model.train()
        images, labels = loader.batch(0, first)
        trainer.step_no_sync(images.double(), labels)
        sums = {name: tensor.clone() for name, tensor in trainer.totals.state_dict().items()}
        return {**trainer.weights(), **trainer.tensors(), **{f"sum of {name}": each for name, each in sums.items()}}

    with tiny_runs.one_thread():
        alone = train(ALONE)
    assert int(alone["sum of samples"]) == (9 if first else 13)
    results = together(size, train, tmp_path)
    for each in results:
        assert tiny_runs.equal(each, results[0]), "ranks must not drift apart"
        torch.testing.assert_close(each, {name: alone[name] for name in each}, rtol=1e-5, atol=1e-6)


def test_an_evaluation_counts_each_image_once_in_the_data_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_runs.prepare(monkeypatch, tmp_path)
    monkeypatch.setattr("fastcifar.evaluation._BATCH", 5)
    store = ArrayStore(tmp_path / "data")
    chosen = runtime.choose(TrainConfig(device="cpu"))
    torch.manual_seed(0)
    model = build_model("tiny", num_classes=3)

    def answer(ranks: Ranks) -> dict[str, Tensor]:
        found = evaluate(
            model, eval_loader(store, "report/train", recipe(), chosen, ranks=ranks), chosen, tta="flip", ranks=ranks
        )
        figures = torch.tensor([found.loss, found.accuracy, found.tta_accuracy or 0], dtype=torch.float64)
        return {"predictions": found.predictions, "labels": found.labels, "figures": figures}

    with tiny_runs.one_thread():
        alone = answer(ALONE)
    assert torch.equal(alone["labels"], torch.from_numpy(store.labels[:48].astype("int64")))
    for size in (2, 3):
        for each in together(size, answer, tmp_path):
            torch.testing.assert_close(each, alone)


def test_what_one_is_asked_all_know(tmp_path: Path) -> None:
    def ask(ranks: Ranks) -> dict[str, Tensor]:
        stop = StopRequest()
        assert ranks.asked(stop) is None
        assert ranks.asked(None) is None
        if ranks.rank == 1:
            stop.hear(signal.SIGTERM)
        assert ranks.asked(stop) == signal.SIGTERM
        assert [ranks.tell(f"{ranks.rank} says \N{BULLET}\udcff"), ranks.tell("" if ranks.first else "x")] == [
            "0 says \N{BULLET}\udcff",
            "",
        ]
        return {}

    together(3, ask, tmp_path)
    stop = StopRequest(signal.SIGINT)
    assert (ALONE.asked(stop), ALONE.tell("own")) == (signal.SIGINT, "own")


def test_a_group_that_is_there_already_is_used_and_left(tmp_path: Path) -> None:
    def nest(ranks: Ranks) -> dict[str, Tensor]:
        with joined("cpu", StopRequest()) as again:
            assert (again.rank, again.size) == (ranks.rank, ranks.size)
        return {"sum": ranks.sum_no_sync([torch.ones(1), torch.ones(2, 2)])[1]}

    assert [each["sum"].tolist() for each in together(2, nest, tmp_path)] == [[[2, 2], [2, 2]]] * 2


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: .* torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, as torchrun sets it, got 'two'"),
        (
            {**environment(rank=0, size=2, port=1), "MASTER_PORT": "x"},
            "the 2 ranks cannot find each other",
        ),
    ],
)
def test_wrong_variables_are_named(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words), joined("cpu", StopRequest()):
        raise AssertionError


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_for() == 1
    for name, value in environment(rank=0, size=1, port=1).items():
        monkeypatch.setenv(name, value)
    with joined("cpu", StopRequest()) as ranks:  # one process under torchrun needs no group
        assert ranks == ALONE
