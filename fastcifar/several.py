"""The folder of several runs: how it is told, and where the runs lie in it.

Example:
    if holds_several(path):
        members(path)            # [path / "seed-0", path / "seed-1"]
"""

from pathlib import Path

__all__ = ["ABLATION", "RECORDS", "SEEDS", "holds_several", "members"]

SEEDS = "seeds.json"
"""What a folder of one run a seed has; no run's own folder has it."""
ABLATION = "ablation.json"
"""What the folder of an ablation's runs has."""
RECORDS = (SEEDS, ABLATION)
"""What says how several runs ended, in the folder of them all."""


def holds_several(folder: Path) -> bool:
    """Whether it is one of several runs."""
    return any((folder / record).is_file() for record in RECORDS)


def members(folder: Path) -> list[Path]:
    """The folders of the runs in it that have begun, sorted; an ablation's lie a folder deeper: VARIANT/seed-N."""
    return sorted(each.parent for pattern in ("*/config.json", "*/*/config.json") for each in folder.glob(pattern))
