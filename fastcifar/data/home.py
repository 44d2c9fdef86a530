"""Where downloads and converted stores live.

`FASTCIFAR_HOME` if it is set, else the user's cache folder, else (where it cannot be made) a
temporary folder, with a warning. This one environment variable is read here, not in `runtime`:
converting data must not import torch.

    find_home() / "stores"
"""

import logging
import os
import tempfile
from pathlib import Path

import platformdirs

__all__ = ["VARIABLE", "find_home"]

VARIABLE = "FASTCIFAR_HOME"

_log = logging.getLogger(__name__)


def find_home() -> Path:
    """The folder for downloads and stores, made if need be.

    Returns:
        A folder that can be written, or an existing one that can at least be read.
    """
    chosen = os.environ.get(VARIABLE)
    home = Path(chosen or "~")
    try:
        home = home.expanduser() if chosen else platformdirs.user_cache_path("fastcifar")
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
        fallback = Path(tempfile.gettempdir()) / f"fastcifar{user}"
        fallback.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid") and fallback.stat().st_uid != os.getuid():  # someone else made it
            fallback = Path(tempfile.mkdtemp(prefix="fastcifar-"))
        _log.warning("%s cannot be made (%s): using %s; set %s to a folder of yours", home, error, fallback, VARIABLE)
        return fallback
    return home
