"""Where downloads and converted stores live.

`FASTCIFAR_HOME` if it is set, else the user's cache folder, else (where it cannot be made) a
temporary folder, with a warning. This one environment variable is read here, not in `runtime`:
converting data must not import torch.

    find_home() / "stores"
"""

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

import platformdirs

__all__ = ["VARIABLE", "find_home"]

VARIABLE = "FASTCIFAR_HOME"

_log = logging.getLogger(__name__)


def find_home(*, make: bool = True) -> Path:
    """The folder for downloads and stores.

    Args:
        make: it if need be; else it may not be there.

    Returns:
        A folder that can be written, or an existing one that can at least be read.
    """
    chosen = os.environ.get(VARIABLE)
    home = Path(chosen or "~")
    try:
        home = home.expanduser() if chosen else platformdirs.user_cache_path("fastcifar")
        if make:
            home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
        fallback = Path(tempfile.gettempdir()) / f"fastcifar{user}"
        with contextlib.suppress(OSError):
            fallback.mkdir(parents=True, mode=0o700)
        if not _is_own(fallback):  # someone else made it
            fallback = Path(tempfile.mkdtemp(prefix="fastcifar-"))
        _log.warning("%s cannot be made (%s): using %s; set %s to a folder of yours", home, error, fallback, VARIABLE)
        return fallback
    return home


def _is_own(folder: Path) -> bool:
    """Whether it is a folder, and no link, that this user alone can write to."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    alone = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    return stat.S_ISDIR(found.st_mode) and alone
