"""The machine code of the CPU kernel: compiled by numba the first time, kept on disk, and loaded without numba.

Importing numba takes 0.3 s and compiling 7 s; loading what is kept takes 0.03 s. It writes, atomically, one
file: to `__pycache__` beside this module, or where that cannot be written to the user's cache folder. A file
that anybody else could have written is not loaded.

    functions = load()
    functions["work"](0, job, spins)                 # int64 all; runs without Python's lock

The key of a file is everything that the code depends on: the sources, numba, LLVM and the processor.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import platformdirs

from fastcifar.kernels.cpu_fields import FUNCTIONS
from fastcifar.publish import publish_bytes

__all__ = ["Functions", "load"]

Functions = Mapping[str, Callable[..., int]]

_SOURCES = ("cpu_fields.py", "cpu_jobs.py", "cpu_loops.py", "cpu_random.py", "cpu_words.py", "machine.py", "rng.py")
_PREFIX = "fastcifar_"
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def load() -> Functions:
    """What `cpu_jobs` and `cpu_loops` define, by name; the first call loads or compiles it, others wait for it."""
    with _lock:
        return _load()


@functools.cache
def _load() -> Functions:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name = f"fastcifar-kernel-{_key()}.bin"
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError):
            return _link(_read(folder / name))
    code = _compile()
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            publish_bytes(folder / name, hashlib.sha256(code).digest() + code)
            break
    else:
        _log.info("the CPU kernel's code cannot be kept: each process compiles it anew")
    return _link(code)


def _folders() -> list[Path]:
    return [Path(__file__).parent / "__pycache__", platformdirs.user_cache_path("fastcifar")]


def _key() -> str:
    parts = [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvm.get_process_triple()]
    parts += [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    digest = hashlib.sha256("\n".join(parts).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def _compile() -> bytes:
    """An object file with the functions of `cpu_jobs` and `cpu_loops`, which calls nothing but libc."""
    from numba import cfunc, types

    from fastcifar.kernels import cpu_jobs, cpu_loops

    sources = {**vars(cpu_loops), **vars(cpu_jobs)}
    whole = llvm.parse_assembly("")
    for name, count in FUNCTIONS.items():
        made = cfunc(types.int64(*[types.int64] * count), error_model="numpy")(sources[name])
        module = llvm.parse_assembly(made._library.get_llvm_str())
        for function in module.functions:
            if function.name == made._wrapper_name:
                function.name = _PREFIX + name
            elif not function.is_declaration:
                function.linkage = "internal"  # so that it goes into its caller, and what handles its errors goes
        whole.link_in(module)
    machine = _machine()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(whole, builder)
    return machine.emit_object(whole)  # type: ignore[no-any-return]


def _machine() -> Any:
    """This processor, as numba describes it to LLVM."""
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )


def _read(path: Path) -> bytes:
    """The object file that is kept at `path`, behind its SHA-256.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or others could have written it.
    """
    with open(path, "rb") as handle:
        status = os.fstat(handle.fileno())
        if hasattr(os, "getuid") and (status.st_uid not in (os.getuid(), 0) or status.st_mode & stat.S_IWOTH):
            raise ValueError(f"{path} could have been written by others")
        content = handle.read()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged")
    return content[32:]


def _link(code: bytes) -> Functions:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    functions = {
        name: ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)(engine.get_function_address(_PREFIX + name))
        for name, count in FUNCTIONS.items()
    }
    engine.detach()  # the code stays to the process's end: a helper may be in it even then
    return functions
