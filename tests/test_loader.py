import dataclasses
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcifar
from fastcifar.config import Augment
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.errors import ConfigError
from fastcifar.loader import Loader

AUGMENT = Augment(crop=2, padding="reflect", flip="random", cutout=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArrayStore:
    """103 training images in two files, 20 for test; the label is the image's number, so that samples are known."""
    generator = np.random.default_rng(0)
    sizes = {"a": 60, "b": 43, "c": 20}
    files, start = [], 0
    for name, size in sizes.items():
        images = generator.integers(0, 256, (size, 8, 8, 3), np.uint8)
        files.append(SourceFile(name, images, np.arange(start, start + size)))
        start += size
    path = tmp_path_factory.mktemp("loader") / "store"
    splits = {"full": {"train": ["a", "b"], "test": ["c"]}}
    write_store(path, files, name="numbered", classes=[str(i) for i in range(123)], splits=splits, source={})
    return ArrayStore(path)


def labels_of(loader: Loader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_the_example_of_the_documentation(store: ArrayStore) -> None:
    loader = fastcifar.Loader(
        store,
        split="train",
        batch_size=32,
        seed=0,
        augment=fastcifar.Augment(crop=2, padding="reflect", flip="alternating", cutout=0),
        scaling="standardize",
        dtype=torch.float32,
        device="cpu",
        order="random",
        drop_last=True,
        placement="auto",
        backend="auto",
        rank=0,
        world_size=1,
    )
    assert len(loader) == 3
    for images, labels in loader:
        assert images.shape == (32, 3, 8, 8)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (32,)
        assert labels.dtype == torch.int64


def test_each_epoch_has_each_sample_once_in_a_new_order(store: ArrayStore) -> None:
    loader = Loader(store, batch_size=10)
    first, second = labels_of(loader), labels_of(loader)
    assert sorted(first) == sorted(second) == list(range(103))
    assert first != second
    assert first != sorted(first)
    assert labels_of(Loader(store, batch_size=10)) == first
    assert labels_of(Loader(store, batch_size=10, seed=1)) != first
    assert labels_of(Loader(store, batch_size=10, order="sequential")) == list(range(103))
    assert labels_of(Loader(store, split="test", batch_size=10, order="sequential")) == list(range(103, 123))
    assert sorted(labels_of(Loader(store, batch_size=10, split="holdout/validation"))) == sorted(
        store.labels[store.split("holdout/validation").rows].tolist()
    )


def test_without_augmentation_batches_are_the_scaled_images(store: ArrayStore) -> None:
    raw = {int(label): image for label, image in zip(store.labels, store.images, strict=True)}
    for images, labels in Loader(store, batch_size=50, scaling="raw"):
        for image, label in zip(images, labels, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), raw[int(label)])
    images = torch.cat([images for images, _ in Loader(store, batch_size=50)])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_the_test_images_are_scaled_by_the_training_images(store: ArrayStore) -> None:
    train = store.split("train")
    images, labels = Loader(store, split="test", batch_size=20, order="sequential").batch(0, 0)
    expected = (store.images[103:].astype(np.float64) - train.mean) / train.std
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), expected, atol=2e-4)
    assert labels[0] == 103


@pytest.mark.parametrize("backend", ["cpu", "dali", "eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_is_a_pure_function_of_seed_epoch_and_step(store: ArrayStore, backend: Any, dtype: torch.dtype) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    options: Any = {"batch_size": 16, "seed": 5, "augment": AUGMENT, "dtype": dtype}
    loader = Loader(store, backend="cpu", **options)
    passes = [list(loader) for _ in range(2)]
    other = Loader(store, backend=backend, **options)
    for epoch, step in [(1, 3), (0, 6), (0, 0), (1, 3)]:  # in any order, as often as wanted
        assert same(other.batch(epoch, step), passes[epoch][step])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_out_each_global_batch(store: ArrayStore, world_size: int, drop_last: bool) -> None:
    options: Any = {"batch_size": 20, "augment": AUGMENT, "drop_last": drop_last}
    whole = Loader(store, **options)
    ranks = [Loader(store, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    assert {len(loader) for loader in ranks} == {len(whole)} == {5 if drop_last else 6}
    for step in range(len(whole)):
        parts = [loader.batch(0, step) for loader in ranks]
        sizes = [len(part.labels) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([part.images for part in parts]), whole.batch(0, step).images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.batch(0, step).labels)


@pytest.mark.parametrize("world_size", [1, 3])
def test_padding_keeps_shapes_and_is_masked(store: ArrayStore, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        loader = Loader(store, batch_size=25, order="sequential", pad_last=True, rank=rank, world_size=world_size)
        for batch in loader:
            assert batch.images.shape[0] == len(batch.labels) == -(-25 // world_size)
            assert (batch.images[~batch.mask] == 0).all()
            assert (batch.labels[~batch.mask] == -100).all()
            seen += batch.labels[batch.mask].tolist()
    assert sorted(seen) == list(range(103))


def test_a_position_is_restored_at_every_step(store: ArrayStore) -> None:
    options: Any = {"batch_size": 30, "augment": AUGMENT}
    through = Loader(store, **options)
    batches = [batch for _ in range(2) for batch in through]
    for done in range(len(batches) + 1):
        first = Loader(store, **options)
        taken = 0
        while taken < done:
            for _ in first:
                taken += 1
                if taken == done:
                    break
        second = Loader(store, **options)
        second.load_state_dict(first.state_dict())
        rest = [batch for _ in range(3) for batch in second][: len(batches) - done]
        assert len(rest) == len(batches) - done
        assert all(same(a, b) for a, b in zip(rest, batches[done:], strict=True))


def test_a_state_holds_for_any_rank_and_is_small(store: ArrayStore) -> None:
    import json

    loader = Loader(store, batch_size=20)
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    assert len(json.dumps(state)) < 600
    for rank in range(3):
        other = Loader(store, batch_size=20, rank=rank, world_size=3)
        other.load_state_dict(state)
        assert same(next(iter(other)), other.batch(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "0"}, "its digest is '0'"),
        ({"split": "full/test"}, "its split is 'full/test', here 'full/train'"),
        ({"batch_size": 7}, "its batch_size is 7, here 20"),
        ({"seed": 1}, "its seed is 1"),
        ({"scaling": "raw"}, "its scaling is 'raw'"),
        ({"augment": None}, "its augment is None"),
        ({"version": 2}, "version 2"),
        ({"step": 99}, "step 99, an epoch has 6"),
        ({"step": -1}, "step -1"),
        ({"epoch": 3, "step": 99}, "step 99, an epoch has 6"),
        ({"epoch": None}, "epoch must be a whole number"),
    ],
)
def test_another_data_sets_state_is_refused(store: ArrayStore, change: dict[str, Any], message: str) -> None:
    loader = Loader(store, batch_size=20)
    state = loader.state_dict()
    with pytest.raises(ConfigError, match=message):
        loader.load_state_dict(state | change)
    assert loader.state_dict() == state


def test_numbers_may_be_numpys(store: ArrayStore) -> None:
    import json

    names = {"batch_size": 20, "seed": 3, "rank": 1, "world_size": 2, "block_size": 8, "window": 2}
    loader = Loader(store, order="block", **{name: np.int32(value) for name, value in names.items()})  # type: ignore[arg-type]
    plain = Loader(store, order="block", **names)  # type: ignore[arg-type]
    assert json.dumps(loader.state_dict()) == json.dumps(plain.state_dict())
    for each in (loader, plain):
        each.set_epoch(np.int64(5))  # type: ignore[arg-type]
    assert loader.state_dict()["epoch"] == 5
    assert same(next(iter(loader)), next(iter(plain)))


def test_a_batch_that_was_not_given_comes_next(store: ArrayStore) -> None:
    calls = []

    def fail_once(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        if calls[-1] == 2:
            raise KeyboardInterrupt
        return images

    loader = Loader(store, batch_size=20, transform=fail_once)
    given = []
    with pytest.raises(KeyboardInterrupt):
        given.extend(loader)
    state = loader.state_dict()
    assert state["step"] == 2
    loader.load_state_dict(state)
    assert same(next(iter(loader)), loader.batch(0, 2))


def test_a_pass_that_was_broken_off_is_followed_by_the_next_epoch(store: ArrayStore) -> None:
    loader = Loader(store, batch_size=20)
    for _ in loader:
        break
    assert same(next(iter(loader)), loader.batch(1, 0))
    loader.set_epoch(7)
    assert same(next(iter(loader)), loader.batch(7, 0))


def test_breaking_off_leaves_nothing_behind(store: ArrayStore) -> None:
    threads = threading.active_count()
    loader = Loader(store, batch_size=20, placement="stream")
    passed = iter(loader)
    next(passed)
    assert threading.active_count() > threads  # the one that reads ahead
    del passed
    for _ in range(50):
        for _ in loader:
            break
    gc.collect()
    until = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < until:  # a thread that was told to may yet end
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_loaders_share_one_copy_of_the_bytes(store: ArrayStore) -> None:
    from fastcifar import placement as module

    gc.collect()
    before = len(module._placed)
    first, second = Loader(store, split="train"), Loader(store.path, split="test")
    assert first._pipeline.images is second._pipeline.images
    assert (len(first.dataset), len(second.dataset)) == (103, 20)
    assert len(module._placed) == before + 1
    del first, second
    gc.collect()
    assert len(module._placed) == before


def test_a_damaged_store_is_found_when_it_is_placed(store: ArrayStore, tmp_path: Path) -> None:
    import shutil

    from fastcifar.errors import DataError

    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    with open(copy / "images.npy", "r+b") as handle:
        handle.seek(1000)
        handle.write(b"\0\1\2\3")
    with pytest.raises(DataError, match="do not have their checksum"):
        Loader(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to .*, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"seed": -1}, "seed must be"),
        ({"rank": 2, "world_size": 2}, "rank must be a whole number from 0 to 1, got 2"),
        ({"world_size": 0}, "world_size must be"),
        ({"world_size": "2"}, "world_size must be a whole number from 1 to .*, got '2'"),
        ({"scaling": "zscore"}, "scaling must be one of raw, unit, signed, standardize, got 'zscore'"),
        ({"order": "shuffled"}, "order must be one of"),
        ({"placement": "gpu"}, "placement must be one of"),
        ({"backend": "dali9"}, "backend must be one of"),
        ({"dtype": torch.float64}, "dtype must be one of .*got torch.float64"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
        ({"augment": {"crop": 2}}, "augment must be an Augment or None"),
        ({"augment": Augment(crop=8)}, "crop must be from 0 to 7 for images of 8 x 8, got 8"),
        ({"augment": Augment(cutout=9)}, "cutout must be from 0 to 8 for images of 8 x 8, got 9"),
        ({"drop_last": True, "pad_last": True}, "cannot both be on"),
        ({"block_size": 1.5}, "block_size must be a whole number from 1 to 2147483647, got 1.5"),
        ({"window": 0}, "window must be a whole number from 1"),
        ({"transform": 3}, "transform must be a module or a callable, got 3"),
        ({"backend": "cuda"}, "backend 'cuda' needs device cuda, got 'cpu': use backend 'auto'"),
    ],
)
def test_a_wrong_option_names_itself_its_value_and_what_is_allowed(
    store: ArrayStore, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Loader(store, **options)
    assert "\n" not in str(caught.value)


def test_a_step_out_of_range_is_an_index_error(store: ArrayStore) -> None:
    with pytest.raises(IndexError, match="step 6 is out of range: an epoch has 6 batches"):
        Loader(store, batch_size=20).batch(0, 6)
    for position in (0, "1"), (0.5, 0), (None, 0):
        with pytest.raises(ConfigError, match="epoch and step must be whole numbers, got "):
            Loader(store, batch_size=20).batch(*position)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="epoch must be"):
        Loader(store).set_epoch(-1)


class Noise(torch.nn.Module):
    """Draws from torch's global generator, as modules do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + torch.randn_like(images)


def test_a_users_module_gets_the_finished_images_and_its_draws_are_part_of_the_function(store: ArrayStore) -> None:
    options: Any = {"batch_size": 20, "augment": AUGMENT}
    plain, noisy = Loader(store, **options), Loader(store, transform=Noise(), **options)
    state = torch.get_rng_state()
    first = noisy.batch(1, 2)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator was not moved
    torch.randn(7)
    assert same(noisy.batch(1, 2), first)
    noise = first.images - plain.batch(1, 2).images
    assert 0.9 < noise.std() < 1.1
    assert not torch.equal(noise, noisy.batch(1, 3).images - plain.batch(1, 3).images)
    assert torch.equal(first.labels, plain.batch(1, 2).labels)
    noises = []
    for rank in (0, 1):
        part: Any = {"rank": rank, "world_size": 2, **options}
        with_noise, without = Loader(store, transform=Noise(), **part), Loader(store, **part)
        noises.append(with_noise.batch(1, 2).images - without.batch(1, 2).images)
    assert not torch.allclose(*noises, atol=1e-2)


def test_modules_of_two_threads_draw_as_they_do_alone(store: ArrayStore) -> None:
    def slow(images: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(2)
        time.sleep(0.001)
        return images + noise.sum() + torch.rand(1)

    loaders = [Loader(store, batch_size=20, seed=seed, transform=slow) for seed in range(3)]
    expected = [[loader.batch(0, step).images for step in range(6)] for loader in loaders]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda loader: [loader.batch(0, step).images for step in range(6)], loaders))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other))


def test_an_error_in_a_users_module_is_the_users(store: ArrayStore) -> None:
    def fail(images: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    loader = Loader(store, transform=fail, placement="stream")
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", ["trivial", "rand"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_policy_comes_after_crop_and_flip_and_before_scaling_and_cutout(
    store: ArrayStore, policy: Any, backend: Any
) -> None:
    from fastcifar.policies import Policy, PolicyAugment

    kernel = Augment(crop=2, flip="random")
    options: Any = {"batch_size": 30, "seed": 7, "pad_last": True}
    whole = Augment(crop=2, flip="random", cutout=3, policy=policy, magnitude=20)
    loader = Loader(store, augment=whole, backend=backend, dtype=torch.float16, **options)
    raw = Loader(store, augment=kernel, scaling="raw", **options)
    for step in (1, 3):
        images, labels = raw.batch(2, step)
        real = int((labels >= 0).sum())
        rows = torch.tensor([int(label) for label in labels[:real]])  # each label is its image's row
        apply = PolicyAugment(Policy(kind=policy, magnitude=20), shape=(8, 8), seed=7, device=torch.device("cpu"))
        pixels = apply(images[:real].to(torch.uint8), rows, epoch=2).permute(0, 2, 3, 1).numpy()
        plan = loader._plan
        values = (pixels.astype(np.float32) * plan.scale + plan.shift).astype(np.float16)
        batch = loader.batch(2, step)
        assert torch.equal(batch.labels, labels)
        found = batch.images[:real].permute(0, 2, 3, 1).numpy()
        cut = found == 0
        assert (cut.all(-1).sum((1, 2)) >= 9).all()
        assert np.array_equal(np.where(cut, 0, values), found)
        assert not batch.images[real:].any()
    assert loader.state_dict()["augment"]["policy"] == policy


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.4}])
@pytest.mark.parametrize("placement", ["device", "stream"])
def test_a_policy_for_the_first_epochs_alone(store: ArrayStore, backend: Any, mixed: Any, placement: Any) -> None:
    plain = Augment(crop=2, flip="alternating", cutout=3, **mixed)
    policy = dataclasses.replace(plain, policy="trivial")
    some = dataclasses.replace(policy, policy_epochs=2)
    options: Any = {"batch_size": 40, "backend": backend, "placement": placement}
    without, throughout, first = (Loader(store, augment=one, **options) for one in (plain, policy, some))
    for epoch in (0, 1):
        assert same(first.batch(epoch, 1), throughout.batch(epoch, 1))
        assert not same(first.batch(epoch, 1), without.batch(epoch, 1))
    for epoch in (2, 3, 2**32 - 1):
        assert same(first.batch(epoch, 1), without.batch(epoch, 1))
        assert same(first.batch_at(torch.tensor([epoch, 1])), without.batch(epoch, 1))
        assert not same(first.batch(epoch, 1), throughout.batch(epoch, 1))
    for epoch, like in enumerate((throughout, throughout, without, without)):
        like.set_epoch(epoch)
        assert all(same(a, b) for a, b in zip(first, like, strict=True))
    state = throughout.state_dict()
    assert "policy_epochs" not in state["augment"]  # so that states from before it was an option fit
    with pytest.raises(ConfigError, match=r"its augment is .*, here .*'policy_epochs': 2"):
        first.load_state_dict(state)


def test_loaders_and_splits_say_what_they_are(store: ArrayStore) -> None:
    loader = Loader(store, batch_size=20, dtype=torch.float16)
    assert repr(loader) == f"Loader(store={store!r}, batch_size=20, dtype=torch.float16)"
    assert repr(loader.dataset) == f"Split('full/train', {len(loader.dataset)} images)"


# Where a DataLoader is expected -----------------------------------------------------------------------------------


def test_the_view_for_a_data_loader(store: ArrayStore) -> None:
    from torch.utils.data import DataLoader, IterableDataset

    loader, view = Loader(store, batch_size=20), Loader(store, batch_size=20).as_iterable_dataset()
    assert isinstance(view, IterableDataset)
    wrapped: DataLoader[Any] = DataLoader(view, batch_size=None)
    assert len(wrapped) == len(loader) == 6
    for _ in range(2):  # epochs advance
        assert all(same(fastcifar.Batch(*a), b) for a, b in zip(wrapped, loader, strict=True))
    with pytest.raises(ConfigError, match="num_workers must be 0"):
        next(iter(DataLoader(view, batch_size=None, num_workers=1)))


def test_a_plain_training_loop_takes_it_for_a_data_loader(store: ArrayStore) -> None:
    def train(loader: Any, epochs: int) -> list[float]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 123))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses = []
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            assert len(loader) == -(-len(loader.dataset) // loader.batch_size)
            for images, labels in loader:
                loss = torch.nn.functional.cross_entropy(net(images), labels)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                losses.append(loss.item())
        return losses

    losses = train(Loader(store, batch_size=20), 8)
    assert losses == train(Loader(store, batch_size=20), 8)
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])


def test_a_compiled_step_may_contain_the_loader(store: ArrayStore) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    loader = Loader(store, batch_size=25, augment=AUGMENT)
    weight = torch.randn(192, 123)

    @torch.compile(fullgraph=True, backend=backend)
    def step(position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = loader.batch_at(position)
        return torch.nn.functional.cross_entropy(images.flatten(1) @ weight, labels), labels

    for epoch, number in ((0, 0), (0, 1), (3, 4)):
        loss, labels = step(torch.tensor([epoch, number]))
        batch = loader.batch(epoch, number)
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(batch.images.flatten(1) @ weight, batch.labels)
        )
        assert (labels[: len(batch.labels)] == batch.labels).all()
        assert (labels[len(batch.labels) :] == -100).all()
    assert len(graphs) == 1  # no recompilation
    with pytest.raises(IndexError, match="step 5 is out of range"):
        loader.batch_at(torch.tensor([0, 5]))
    with pytest.raises(ConfigError, match="position must be on the loader's device, cpu, and is on meta"):
        loader.batch_at(torch.zeros(2, dtype=torch.int64, device="meta"))
    for wrong, told in (
        (torch.tensor([0]), r"torch.int64\[1\]"),
        (torch.zeros(2, dtype=torch.int32), r"torch.int32\[2\]"),
        (torch.zeros(2), r"torch.float32\[2\]"),
        ([0, 1], r"\[0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=rf"position must be a tensor int64\[2\], \(epoch, step\), got {told}"):
            loader.batch_at(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="without transform"):
        Loader(store, transform=Noise()).batch_at(torch.tensor([0, 0]))


@pytest.mark.parametrize("options", [{}, {"channels_last": False, "dtype": torch.bfloat16}, {"mix": 1.0}])
def test_the_operator_keeps_torchs_rules(store: ArrayStore, options: dict[str, Any]) -> None:
    mix = options.pop("mix", 0)
    loader = Loader(store, batch_size=10, world_size=3, augment=Augment(crop=1, mixup=mix), **options)
    torch.library.opcheck(torch.ops.fastcifar.batch.default, (torch.tensor([1, 2]), loader._handle))
