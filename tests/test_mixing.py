"""mixup and CutMix: what is mixed with what, in which share, and that it depends on nothing but seed, epoch and row."""

from typing import Any

import numpy as np
import pytest
import torch

from fastcifar import ArrayStore, Augment, Loader
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.mixing import Mixer
from tests.test_rng import chi_square_is_plausible

CPU = torch.device("cpu")


def make(**options: Any) -> Mixer:
    return Mixer(**{"mixup": 0.0, "cutmix": 0.0, "classes": 4, "shape": (8, 10), "seed": 3, "device": CPU, **options})


def constant_images(values: torch.Tensor) -> torch.Tensor:
    return values.float()[:, None, None, None].expand(-1, 3, 8, 10).contiguous(memory_format=torch.channels_last)


def test_mixup_mixes_neighbours_by_one_share_for_pixels_and_labels() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0])
    images = constant_images(torch.tensor([0, 100, 200, 300, 400]))
    mixed, soft = make(mixup=1.0)(images, labels, torch.arange(5), epoch=0)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(5))
    for i in range(4):
        share = soft[i, labels[i]]
        assert 0 < share < 1
        assert soft[i, labels[i ^ 1]] == 1 - share
        expected = share * images[i] + (1 - share) * images[i ^ 1]
        assert torch.equal(mixed[i], expected)
    assert torch.equal(mixed[4], images[4])  # nobody to mix with
    assert soft[4].tolist() == [1, 0, 0, 0]


def test_cutmix_replaces_a_box_of_the_share_that_the_label_has() -> None:
    count = 400
    labels = torch.arange(count) % 2
    images = constant_images(torch.arange(count))
    mixed, soft = make(cutmix=1.0)(images, labels, torch.arange(count), epoch=1)
    areas = []
    for i in range(count):
        own = (mixed[i, 0] == i).numpy()
        assert ((mixed[i] == i) | (mixed[i] == (i ^ 1))).all()
        assert soft[i, labels[i]].item() == pytest.approx(own.mean(), abs=1e-6)
        rows, columns = np.where(~own)
        if rows.size:  # the box is full
            assert rows.size == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        areas.append(1 - own.mean())
    assert max(areas) > 0.7
    assert min(areas) < 0.02


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    from scipy.stats import beta

    count = 20_000
    images = torch.zeros(count, 1, 1, 1)
    labels = torch.arange(count) % 2
    _, soft = make(mixup=alpha, shape=(1, 1))(images, labels, torch.arange(count), epoch=0)
    shares = soft[torch.arange(count), labels].double().numpy()
    points = np.linspace(0.02, 0.98, 49)
    below = (shares[:, None] <= points).mean(0)
    assert np.abs(below - beta.cdf(points, alpha, alpha)).max() < 4 * 0.5 / count**0.5  # four standard errors
    assert abs(np.corrcoef(shares[0::2], shares[1::2])[0, 1]) < 0.05  # of the two of a pair


def test_boxes_lie_anywhere_and_each_kind_comes_as_often() -> None:
    count = 8000
    images = constant_images(torch.arange(count))
    labels = torch.arange(count) % 2
    mixed, soft = make(mixup=1.0, cutmix=1.0, classes=2)(images, labels, torch.arange(count), epoch=2)
    # CutMix leaves whole values, mixup does not (but where a share is a multiple of 1/65536 of a difference of 1)
    cut = ((mixed == images) | (mixed == images[torch.arange(count) ^ 1])).flatten(1).all(1)
    assert 0.48 < cut.float().mean() < 0.52
    shares = soft[torch.arange(count), labels]
    for kind in (cut, ~cut):  # which one a sample has says nothing of its share
        assert shares[kind].min() < 0.1
        assert shares[kind].max() > 0.9
    below = (shares[~cut, None] <= torch.linspace(0.1, 0.9, 9)).float().mean(0)
    torch.testing.assert_close(below, torch.linspace(0.1, 0.9, 9), atol=0.04, rtol=0)  # Beta(1, 1) is uniform
    rng_state = torch.get_rng_state()
    single, _ = make(cutmix=1.0)(images, torch.zeros(count, dtype=torch.int64), torch.arange(count), epoch=2)
    assert torch.equal(torch.get_rng_state(), rng_state)
    replaced = (single[:, 0] != images[:, 0]).float().mean(0)  # how often each pixel is
    assert replaced.min() > 0.12  # at the corners the box is cut off
    middle = replaced[2:6, 3:7]
    assert middle.max() - middle.min() < 0.15


def test_draws_depend_on_seed_epoch_and_row_alone() -> None:
    images, labels = torch.rand(6, 3, 8, 10), torch.arange(6) % 4
    rows = torch.tensor([5, 2**40, 7, 8, 1, 0])
    mixer = make(mixup=0.4, cutmix=1.0)
    one = mixer(images, labels, rows, epoch=4)
    alone = [mixer(images[i : i + 2], labels[i : i + 2], rows[i : i + 2], epoch=4) for i in (0, 2, 4)]
    for k in range(2):
        assert torch.equal(one[k], torch.cat([pair[k] for pair in alone]))
    assert not torch.equal(one[1], mixer(images, labels, rows, epoch=5)[1])
    assert not torch.equal(one[1], make(mixup=0.4, cutmix=1.0, seed=4)(images, labels, rows, epoch=4)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_types_are_mixed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    images, labels, rows = torch.rand(8, 3, 8, 10).to(dtype), torch.arange(8) % 4, torch.arange(8)
    mixed, soft = make(mixup=1.0)(images, labels, rows, epoch=0)
    wide, wide_soft = make(mixup=1.0)(images.float(), labels, rows, epoch=0)
    assert torch.equal(mixed, wide.to(dtype))
    assert torch.equal(soft, wide_soft)


def test_it_compiles_whole() -> None:
    images, labels, rows = torch.rand(8, 3, 8, 10), torch.arange(8) % 4, torch.arange(8)
    mixer = make(mixup=0.5, cutmix=0.5)
    compiled = torch.compile(lambda i, t, r: mixer(i, t, r, epoch=3), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(images, labels, rows), mixer(images, labels, rows, epoch=3), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArrayStore:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (57, 8, 8, 3), np.uint8)
    path = tmp_path_factory.mktemp("mixing") / "store"
    file = SourceFile("a", images, generator.integers(0, 5, 57))
    write_store(path, [file], name="m", classes=list("abcde"), splits={"full": {"train": ["a"]}}, source={})
    return ArrayStore(path)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("policy", ["none", "rand"])
def test_the_global_batch_does_not_depend_on_the_ranks(store: ArrayStore, world_size: int, policy: Any) -> None:
    options: Any = {"batch_size": 14, "augment": Augment(crop=1, flip="random", mixup=0.3, cutmix=1.0, policy=policy)}
    whole = Loader(store, **options)
    ranks = [Loader(store, rank=r, world_size=world_size, **options) for r in range(world_size)]
    for step in range(len(whole)):
        batch, parts = whole.batch(1, step), [rank.batch(1, step) for rank in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)


def test_padding_of_a_mixed_batch(store: ArrayStore) -> None:
    loader = Loader(store, batch_size=14, augment=Augment(mixup=0.3), pad_last=True)
    batch = loader.batch(0, 4)
    assert batch.images.shape == (14, 3, 8, 8)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.shape == (14, 5)
    assert batch.mask.tolist() == [True] + [False] * 13
    assert not batch.images[1:].any()
    loss = torch.nn.functional.cross_entropy(torch.randn(14, 5), batch.labels, reduction="sum")
    assert torch.isfinite(loss)


def test_chosen_partners_are_uniform(store: ArrayStore) -> None:
    """Under the order `random` the neighbour is any other sample, equally often."""
    loader = Loader(store, batch_size=57)
    counts = np.zeros(57)
    for epoch in range(600):
        rows = _rows(loader, epoch)
        place = int(np.flatnonzero(rows == 5)[0])
        if place != 56:
            counts[rows[place ^ 1]] += 1
    counts = np.delete(counts, 5)
    assert chi_square_is_plausible(counts, counts.sum() / 56, 55)


def _rows(loader: Loader, epoch: int) -> Any:
    from fastcifar.kernels.plan import rows_at

    return rows_at(loader._plan, np.arange(57), epoch)
