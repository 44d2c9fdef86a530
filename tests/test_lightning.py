"""A Loader where Lightning's Trainer expects a DataLoader."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcifar import Augment, Loader, open_store

lightning = pytest.importorskip("lightning", reason="lightning is not installed")


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, labels = batch
        self.seen.append(tuple(labels.tolist()))
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, index: int) -> None:
        images, labels = batch
        found = self.net(images).argmax(1)
        self.log("accuracy", (found == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loaders() -> tuple[Loader, Loader]:
    store = open_store("digits")
    return (
        Loader(store, batch_size=128, augment=Augment(crop=2), drop_last=True),
        Loader(store, split="test", batch_size=128, order="sequential"),
    )


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCIFAR_HOME", str(tmp_path / "home"))
    warnings.filterwarnings("ignore", module="lightning")


@pytest.mark.filterwarnings("ignore")
def test_trains_epoch_after_epoch(tmp_path: Path) -> None:
    train, test = loaders()
    net = Net()
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    run.fit(net, train, test)
    expected = [tuple(train.batch(epoch, step).labels.tolist()) for epoch in range(2) for step in range(len(train))]
    assert net.seen == expected
    assert run.callback_metrics["accuracy"] > 0.2


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_within_an_epoch_keeps_the_loaders_place(tmp_path: Path) -> None:
    """Lightning saves and restores what has state_dict and load_state_dict."""
    train, _ = loaders()
    whole = Net()
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(whole, train)
    first, second = Net(), Net()
    save = lightning.pytorch.callbacks.ModelCheckpoint(every_n_train_steps=7, dirpath=tmp_path, filename="at")
    trainer(tmp_path, max_steps=7, callbacks=[save]).fit(first, loaders()[0])
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(
        second, loaders()[0], ckpt_path=tmp_path / "at.ckpt"
    )
    assert first.seen + second.seen == whole.seen


class Counted(Net):
    def on_train_epoch_start(self) -> None:  # as README.md says
        self.trainer.train_dataloader.set_epoch(self.current_epoch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "when"),
    [(Counted, {"every_n_epochs": 1}), (Net, {"every_n_train_steps": 11}), (Counted, {"every_n_train_steps": 11})],
)
def test_a_checkpoint_between_epochs_goes_on_with_the_next(
    tmp_path: Path, kind: type[Net], when: dict[str, int]
) -> None:
    train, _ = loaders()
    assert len(train) == 11
    whole = Net()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(whole, train)
    first, second = kind(), kind()
    save = lightning.pytorch.callbacks.ModelCheckpoint(**when, dirpath=tmp_path, filename="at")
    trainer(tmp_path, max_epochs=1, callbacks=[save]).fit(first, loaders()[0])
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(
        second, loaders()[0], ckpt_path=tmp_path / "at.ckpt"
    )
    assert first.seen + second.seen == whole.seen
