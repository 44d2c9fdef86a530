"""The CPU kernel's machine code: kept on disk, loaded without numba, and made anew where what is kept is no good."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastcifar.kernels import machine
from fastcifar.kernels.cpu_fields import BOX_WORDS, TAKING

BATCH = """
import numpy as np, torch
from fastcifar.kernels.cpu import CpuKernel
from fastcifar.kernels.plan import Plan
from fastcifar.kernels import reference
images = np.random.default_rng(0).integers(0, 256, (300, 9, 7, 3), dtype=np.uint8)
for dtype in ("float32", "bfloat16", "float16"):
    for channels_last in (True, False):
        plan = Plan(samples=300, crop=4, flip="random", order="block", block_size=7, cutout=3, dtype=dtype,
                    channels_last=channels_last, scale=np.ones(3, np.float32), shift=np.zeros(3, np.float32))
        out, _ = CpuKernel(images, np.zeros(300), plan)(epoch=0, start=0, size=300)
        expected, _ = reference.batch(images, np.zeros(300), plan, epoch=0, start=0, size=300)
        assert np.array_equal(out.float().numpy(), expected.astype(np.float32))
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with this machine's code in it, and a `load` that forgets."""
    machine.load()
    (source,) = [folder / NAME for folder in machine._folders() if (folder / NAME).exists()][:1]
    monkeypatch.setattr(machine, "_folders", lambda: [tmp_path])
    monkeypatch.setattr(machine, "_load", machine._load.__wrapped__)
    return Path(shutil.copy(source, tmp_path / NAME))


NAME = f"fastcifar-kernel-{machine._key()}.bin"


def works(functions: machine.Functions) -> bool:
    import numpy as np

    box = np.arange(BOX_WORDS)
    return functions["leave"](box.ctypes.data, 0) == TAKING


def no_compiling(part: machine.Part) -> bytes:
    raise AssertionError("the kept code was not used")


def test_a_second_process_needs_no_numba() -> None:
    machine.load()
    code = f"import sys; sys.modules['numba'] = None{BATCH}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_kept_code_is_loaded(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_compile", no_compiling)
    assert works(machine.load())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _open_to_all(path: Path) -> None:
    path.chmod(0o666)


def _open_to_a_group(path: Path) -> None:
    path.chmod(0o664)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _open_to_all, _open_to_a_group, _folder, Path.unlink])
def test_code_that_is_no_good_is_made_anew(kept: Path, monkeypatch: pytest.MonkeyPatch, damage: object) -> None:
    code, compiled = machine._read(kept), []
    damage(kept)  # type: ignore[operator]
    monkeypatch.setattr(machine, "_compile", lambda part: compiled.append(1) or code)
    assert works(machine.load())
    assert compiled
    if damage is not _folder:
        assert machine._read(kept) == code  # and kept
        assert kept.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_kept_code_is_its_owners_whatever_the_umask(kept: Path, monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    code = machine._read(kept)
    kept.unlink()
    monkeypatch.setattr(machine, "_compile", lambda part: code)
    before = os.umask(mask)
    try:
        assert works(machine.load())
    finally:
        os.umask(before)
    assert kept.stat().st_mode & 0o777 == 0o644 & ~mask
    monkeypatch.setattr(machine, "_compile", no_compiling)
    assert works(machine.load())


def test_a_user_without_a_home_has_the_code_beside_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_cache_path", fail)
    assert [folder.name for folder in machine._folders()] == ["__pycache__"]


def test_works_where_nothing_can_be_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = machine._read(kept)
    monkeypatch.setattr(machine, "_compile", lambda part: code)
    monkeypatch.setattr(machine, "_folders", lambda: [Path(os.devnull) / "nowhere"])
    assert works(machine.load())


def test_the_first_compilation_gives_the_same(tmp_path: Path) -> None:
    """From the start, as on a fresh machine: numba compiles, the code is kept, a second process loads it."""
    force = f"""
from pathlib import Path
from fastcifar.kernels import machine
from fastcifar.kernels.cpu_fields import BOX_WORDS, TAKING
machine._folders = lambda: [Path({str(tmp_path)!r})]
"""
    subprocess.run([sys.executable, "-c", force + BATCH], check=True, timeout=110)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    code = f"import sys; sys.modules['numba'] = None{force}{BATCH}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_change_of_the_sources_or_the_processor_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(machine.llvm, "get_host_cpu_name", lambda: "abacus")
        assert f"fastcifar-kernel-{machine._key()}.bin" != NAME
    read = Path.read_bytes
    for part in (machine.BATCH, machine.NORMS, machine.WINOGRAD):
        before = machine._key(part)
        for name in part.modules + part.sources:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "read_bytes", lambda path, name=name: read(path) + b"#" * (path.stem == name))
                assert machine._key(part) != before, name


def test_the_sources_are_all_that_the_code_is_made_of() -> None:
    kernels = Path(machine.__file__).parent
    for part in (machine.BATCH, machine.NORMS, machine.WINOGRAD):
        found, left = set[str](), list(part.modules)
        while left:
            name = left.pop()
            found.add(name)
            imported = re.findall(r"^from fastcifar\.kernels\.(\w+) import", (kernels / f"{name}.py").read_text(), re.M)
            left += [one for one in imported if one not in found]
        assert found <= {*part.modules, *part.sources}, part.name


def test_bfloat16_is_multiplied_where_the_processor_does_and_numba_may_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = machine.has_bfloat16.__wrapped__
    monkeypatch.setattr(machine.llvm, "get_host_cpu_features", lambda: {"avx512bf16": True})
    for name in machine._LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert asked()
    with monkeypatch.context() as patch:
        patch.setattr(machine.llvm, "get_host_cpu_name", lambda: "nocona")
        assert not asked()
    with monkeypatch.context() as patch:
        patch.setattr(machine.llvm, "get_host_cpu_features", dict)
        assert not asked()
    for name in machine._LIMITS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "generic")
            assert not asked()
