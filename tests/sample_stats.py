"""A made-up run: stats, summary and result as an engine would report them."""

from fastcifar.metrics import EpochStats, TestStats
from fastcifar.reporter import RunResult, RunSummary

CIFAR10 = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def make_epochs(done: int, *, epochs: int = 20, evaluated: str = "validation") -> tuple[EpochStats, ...]:
    """The first `done` of `epochs` epochs; every number differs from every other."""
    return tuple(
        EpochStats(
            epoch=epoch,
            epochs=epochs,
            step=196 * epoch,
            samples=50_000,
            train_loss=2.0 / epoch + 0.01234,
            train_accuracy=1.0 - 0.6 / epoch - 0.00017,
            evaluated=evaluated,
            eval_loss=1.7 / epoch**0.5 + 0.05678,
            eval_accuracy=0.9 - 0.5 / epoch + 0.00031,
            train_seconds=29.25 + epoch / 64,
            eval_seconds=2.125 + epoch / 64,
            images_per_second=50_000 / (29.25 + epoch / 64),
            learning_rate=1e-3 * (1 - (epoch - 1) / epochs),
        )
        for epoch in range(1, done + 1)
    )


def make_test(classes: tuple[str, ...] = CIFAR10) -> TestStats:
    """A test in which class i is mostly right, and mostly taken for class i + 1 or i - 2 otherwise."""
    k = len(classes)
    rows = []
    for i in range(k):
        row = [0.0] * k
        right = 0.6 + 0.35 * ((7 * i) % k) / k
        row[i] += right
        row[(i + 1) % k] += 0.75 * (1 - right)
        row[(i - 2) % k] += 0.25 * (1 - right)
        rows.append(tuple(row))
    accuracies = tuple(rows[i][i] for i in range(k))
    return TestStats(
        loss=0.81234,
        accuracy=sum(accuracies) / k,
        samples=10_000,
        seconds=1.53,
        classes=classes,
        class_accuracies=accuracies,
        confusion=tuple(rows),
    )


def make_summary(*, epochs: int = 20, evaluated: str = "validation", notices: tuple[str, ...] = ()) -> RunSummary:
    """What a CPU run would say at its start."""
    return RunSummary(
        title="big on cifar10",
        choices=(
            ("device", "cpu: AMD EPYC, 2 threads"),
            ("precision", "float32: this CPU has no bfloat16 units"),
            ("layout", "channels-last"),
            ("compile", "off: on a CPU it costs more than it gains"),
            ("placement", "host: 184.3 MB in memory"),
            ("data", "data_batch_1 to train, data_batch_2 to validate, test_batch to test"),
            ("recipe", "report: Adam, learning rate 1e-3, no augmentation"),
            ("run", "runs/big-cifar10-0"),
        ),
        epochs=epochs,
        steps_per_epoch=196,
        evaluated=evaluated,
        notices=notices,
    )


def make_result(test: TestStats | None = None) -> RunResult:
    """The end of that run."""
    return RunResult(
        test=test or make_test(),
        epochs=20,
        train_seconds=588.28,
        eval_seconds=45.78,
        warmup_seconds=3.21,
        images_per_second=1699.87,
        parameters=5_655_498,
        files=(
            ("checkpoint", "runs/big-cifar10-0/checkpoints/3920"),
            ("figures", "runs/big-cifar10-0/figures"),
            ("report", "runs/big-cifar10-0/report.html"),
        ),
    )
