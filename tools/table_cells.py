"""What the tables of README.md and benchmarks/README.md are made of.

Example:
    grid(["net", "accuracy"], [["small", percent(0.8)]])
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["grid", "measured", "percent", "where"]


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def percent(value: float) -> str:
    """A fraction, as the tables show it."""
    return f"{100 * value:.2f} %"


def measured(result: Mapping[str, Any], *, unit: float = 1, digits: int = 0) -> str:
    """A median and its interval, in `unit`s; or why there is none."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"{result['median'] / unit:,.{digits}f} ± {result['interval95'] / unit:,.{digits}f}"


def where(content: Mapping[str, Any]) -> str:
    """Hardware and version, for the line under a table."""
    receipt = content["receipt"]
    threads = f"{receipt['threads']} thread" + "s" * (receipt["threads"] != 1)
    cpu = " ".join(filter(None, (receipt["cpu"], receipt.get("cpu_model"))))
    return f"{cpu}, {threads}, PyTorch {receipt['torch']}"
