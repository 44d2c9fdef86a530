"""What a run is busy with, and what can be told about it: how far, how fast, how much longer.

Arithmetic on the times it is given; this module touches nothing.

    phase = Phase("training", "steps", since=0.0)
    phase.advance(10, 196, now=2.0)
    phase.facts(now=2.0)                # ["10/196"]
"""

from dataclasses import dataclass

from fastcifar.formats import count, duration, size

__all__ = ["Phase", "amount"]


def amount(done: float, unit: str, total: float | None = None) -> str:
    """`12/196`, `7.5 MB of 170.5 MB` or `2,000 of 50,000 images`."""
    if unit == "bytes":
        return size(done) if total is None else f"{size(done)} of {size(total)}"
    if unit == "steps":
        return count(done) if total is None else f"{count(done)}/{count(total)}"
    return f"{count(done)} {unit}" if total is None else f"{count(done)} of {count(total)} {unit}"


@dataclass
class Phase:
    """One activity: a loop over `total` (None if it isn't known) of `unit`, or a wait without steps.

    Speed is measured from the first call of `advance`, so neither compilation nor the part of a
    download or an epoch that was there before counts.
    """

    name: str
    unit: str
    since: float
    done: int = 0
    total: int | None = None
    images_per_second: float | None = None
    _first: int | None = None
    _first_at: float = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether `advance` was called."""
        return self._first is not None

    def advance(self, done: int, total: int | None, now: float) -> None:
        """`done` of `total` are done at the time `now`."""
        if self._first is None:
            self._first, self._first_at = done, now
        self.done, self.total = done, total

    def speed(self, now: float) -> float | None:
        """Units a second; None as long as nothing tells it."""
        done = self.done - (self._first or 0)
        return done / (now - self._first_at) if done > 0 and now > self._first_at else None

    def left(self, now: float) -> float | None:
        """Seconds until all is done, if that can be told."""
        speed = self.speed(now)
        return (self.total - self.done) / speed if speed and self.total else None

    def facts(self, now: float) -> list[str]:
        """What to show, the most important first."""
        facts = [amount(self.done, self.unit, self.total)]
        if self.images_per_second is not None:
            facts.append(f"{count(self.images_per_second)} images/s")
        speed, left = self.speed(now), self.left(now)
        if speed is not None and self.unit != "steps":
            facts.append(f"{amount(speed, self.unit)}/s")
        if left is not None:
            facts.append(f"{duration(left)} left")
        return facts
