import math

import pytest
import torch
import torch.nn.functional as F

from fastcifar.metrics import Totals


def test_means_are_over_samples_not_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 4, generator=generator)
    labels = torch.randint(0, 4, (10,), generator=generator)
    totals = Totals(torch.device("cpu"))
    for part in (slice(0, 7), slice(7, 10)):  # a short last batch
        totals.add_no_sync(logits[part], labels[part])
    loss, accuracy, samples = totals.read()
    assert samples == 10
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    assert accuracy == (logits.argmax(1) == labels).sum().item() / 10


def test_padding_counts_nothing() -> None:
    logits = torch.tensor([[1.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    labels = torch.tensor([0, -100, -100])
    totals = Totals(torch.device("cpu"))
    totals.add_no_sync(logits, labels)
    loss, accuracy, samples = totals.read()
    assert (accuracy, samples) == (1.0, 1)
    assert loss == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_sums_go_on_where_they_were_saved() -> None:
    first, second = Totals(torch.device("cpu")), Totals(torch.device("cpu"))
    first.add_no_sync(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    second.load_state_dict(first.state_dict())
    assert second.read() == first.read() == (pytest.approx(math.log(2)), 1.0, 1)


def test_nothing_seen_is_not_a_number() -> None:
    loss, accuracy, samples = Totals(torch.device("cpu")).read()
    assert math.isnan(loss)
    assert math.isnan(accuracy)
    assert samples == 0
