"""What the processes of a session use, from /proc: their time and their memory.

Example:
    session(leader)          # process ids
    ticks(leader)            # processor time
    memory(leader)           # bytes; what is shared is counted once
"""

import re
from pathlib import Path

__all__ = ["memory", "session", "ticks"]


def session(leader: int) -> list[int]:
    """The processes of the session that `leader` leads."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if (fields := _stat(pid)) and int(fields[3]) == leader] or [leader]


def ticks(leader: int) -> int:
    """Processor time used by the processes of a session, in ticks."""
    return sum(int(fields[11]) + int(fields[12]) for pid in session(leader) if (fields := _stat(pid)))


def memory(leader: int) -> int:
    """Bytes of memory used by the processes of a session: the sum of their proportional shares (PSS)."""
    return sum(_share(pid) for pid in session(leader))


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; empty where there is no such process."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _share(pid: int) -> int:
    found = re.search(r"^Pss:\s+(\d+) kB", _read(pid, "smaps_rollup"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
