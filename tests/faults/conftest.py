import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder, in memory where that can be: for tests that write thousands of files."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fastcifar-", dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)
