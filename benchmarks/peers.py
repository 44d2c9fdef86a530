"""The environments of other projects' loaders: one folder in .bench for each list in benchmarks/requirements.

    python -m benchmarks.peers [NAME ...]

Other projects' packages stay out of ours: each list is installed into a virtual environment of its own, which
git does not see. A list may begin with

    # base: NAME            also sees what environment NAME has (PyTorch is several GB: it is there once)
    # debian: PACKAGE ...   what must be installed on the system before

What cannot be installed is noted in the environment, and the race reports it.
"""

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

LISTS = Path(__file__).parent / "requirements"
HOME = Path(__file__).parent.parent / ".bench"
OWN = ""
"""The environment that this runs in."""


def python_of(name: str) -> Path:
    """The interpreter of environment `name`.

    Raises:
        RuntimeError: the environment is not there; the message is the reason.
    """
    if name == OWN:
        return Path(sys.executable)
    folder = HOME / name
    if (folder / "failed").exists():
        raise RuntimeError((folder / "failed").read_text(encoding="utf-8"))
    if not _is_ready(name):
        raise RuntimeError(f"environment {name} has not been made: run `make bench-peers`")
    return folder / "bin" / "python"


def make(name: str) -> None:
    """Make environment `name`, unless it is there already, and the one that it is based on."""
    base = _notes(name).get("base")
    if base:
        make(base)
    if _is_ready(name):
        return
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n", encoding="utf-8")
    folder = HOME / name
    print(f"making {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    if base and (HOME / base / "failed").exists():
        shutil.copy(HOME / base / "failed", folder / "failed")
        return
    if base:
        packages = next((HOME / base / "lib").glob("python*/site-packages"))
        own = next((folder / "lib").glob("python*/site-packages"))
        (own / "base.pth").write_text(f"{packages}\n", encoding="utf-8")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--no-cache-dir", "--requirement", LISTS / f"{name}.txt"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        (folder / "ready").write_text(_digest(name), encoding="utf-8")
        return
    errors = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
    reason = errors[0] if errors else f"pip ended with status {done.returncode}"
    if system := _notes(name).get("debian"):
        reason += f" (needs the Debian packages {system})"
    (folder / "failed").write_text(f"it cannot be installed: {reason}", encoding="utf-8")
    print(f"{name}: {reason}\n{done.stderr}", file=sys.stderr, flush=True)


def _notes(name: str) -> dict[str, str]:
    lines = (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    notes = (line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    return {key: value for key, value in notes if key in ("base", "debian")}


def _is_ready(name: str) -> bool:
    ready = HOME / name / "ready"
    return ready.exists() and ready.read_text(encoding="utf-8") == _digest(name)


def _digest(name: str) -> str:
    """Of what is installed: the list, and those of its bases."""
    text = (LISTS / f"{name}.txt").read_text(encoding="utf-8")
    base = _notes(name).get("base")
    return hashlib.sha256((text + (_digest(base) if base else "")).encode()).hexdigest()


if __name__ == "__main__":
    for wanted in sys.argv[1:] or sorted(path.stem for path in LISTS.glob("*.txt")):
        make(wanted)
