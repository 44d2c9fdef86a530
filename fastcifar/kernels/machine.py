"""The machine code of the CPU's kernels: compiled by numba the first time, kept on disk, and loaded without numba.

Importing numba takes 0.3 s and compiling 7 s; loading what is kept takes 0.03 s. It writes, atomically, one
file: to `__pycache__` beside this module, or where that cannot be written to the user's cache folder. A file
that anybody else could have written is not loaded.

    functions = load()                               # of the batch kernel; load(NORMS): of `norms`
    functions["work"](0, job, spins)                 # int64 all; runs without Python's lock

The key of a file is everything that the code depends on: the sources, numba, LLVM and the processor.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import platformdirs

from fastcifar.kernels import cpu_fields, norm_fields, product_fields, winograd_fields
from fastcifar.publish import publish_bytes

__all__ = ["BATCH", "NORMS", "WINOGRAD", "Functions", "Part", "has_bfloat16", "load"]

Functions = Mapping[str, Callable[..., int]]


class Part(NamedTuple):
    """Functions that are compiled, kept and loaded together.

    Attributes:
        name: of its file.
        modules: those that define the functions.
        sources: the modules beside these that their code depends on.
        functions: each one's name, and how many int64 it takes.
    """

    name: str
    modules: tuple[str, ...]
    sources: tuple[str, ...]
    functions: tuple[tuple[str, int], ...]


BATCH = Part(
    "kernel",
    ("cpu_loops", "cpu_jobs"),
    ("cpu_fields", "cpu_random", "cpu_words", "machine", "rng"),
    tuple(cpu_fields.FUNCTIONS.items()),
)
NORMS = Part(
    "norms",
    ("norm_loops", "halve_loops"),
    ("cpu_words", "lanes", "machine", "norm_fields"),
    tuple(norm_fields.FUNCTIONS.items()),
)
WINOGRAD = Part(
    "winograd",
    ("winograd_loops", "winograd_pair_loops", "product_loops"),
    (
        *("cpu_words", "lanes", "machine", "norm_fields", "pair_lanes"),
        *("product_fields", "winograd_fields", "winograd_transforms"),
    ),
    (*winograd_fields.FUNCTIONS.items(), *product_fields.FUNCTIONS.items()),
)

_PREFIX = "fastcifar_"
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_lock = threading.Lock()


def _after_fork() -> None:
    """A forked child has the lock as it was, perhaps held by a thread that it does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_log = logging.getLogger(__name__)


_LIMITS = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")
"""Variables by which numba may be told to write for another processor than this."""


@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor has AVX512-BF16: an instruction that multiplies pairs of bfloat16, and one that rounds.

    Not where numba writes for another: one that it was told of, or LLVM's name for those that virtual machines hide.
    """
    limited = any(name in os.environ for name in _LIMITS) or llvm.get_host_cpu_name() == "nocona"
    return not limited and bool(llvm.get_host_cpu_features().get("avx512bf16", False))


def load(part: Part = BATCH) -> Functions:
    """A part's functions, by name; the first call loads or compiles them, others wait for it."""
    with _lock:
        return _load(part)


@functools.cache
def _load(part: Part) -> Functions:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    name = f"fastcifar-{part.name}-{_key(part)}.bin"
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError):
            return _link(_read(folder / name), part)
    code = _compile(part)
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            publish_bytes(folder / name, hashlib.sha256(code).digest() + code)
            (folder / name).chmod((folder / name).stat().st_mode & 0o644)  # whatever the umask, or `_read` refuses it
            break
    else:
        _log.info("the CPU kernel's code cannot be kept: each process compiles it anew")
    return _link(code, part)


def _folders() -> list[Path]:
    folders = [Path(__file__).parent / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        folders.append(platformdirs.user_cache_path("fastcifar"))
    return folders


def _key(part: Part = BATCH) -> str:
    parts = [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvm.get_process_triple()]
    parts += [importlib.metadata.version(name) for name in ("numba", "llvmlite")] + [str(has_bfloat16())]
    digest = hashlib.sha256("\n".join(parts).encode())
    for name in sorted(part.modules + part.sources):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def _compile(part: Part) -> bytes:
    """An object file with a part's functions, which calls nothing but libc."""
    from numba import cfunc, types

    sources: dict[str, Any] = {}
    for module in part.modules:
        sources.update(vars(importlib.import_module(f"{__package__}.{module}")))
    whole = llvm.parse_assembly("")
    for name, count in part.functions:
        made = cfunc(types.int64(*[types.int64] * count), error_model="numpy")(sources[name])
        code = llvm.parse_assembly(made._library.get_llvm_str())
        for function in code.functions:
            if function.name == made._wrapper_name:
                function.name = _PREFIX + name
            elif not function.is_declaration:
                function.linkage = "internal"  # so that it goes into its caller, and what handles its errors goes
        whole.link_in(code)
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
        if hasattr(os, "getuid") and (status.st_uid not in (os.getuid(), 0) or status.st_mode & _BY_OTHERS):
            raise ValueError(f"{path} could have been written by others")
        content = handle.read()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError(f"{path} is damaged")
    return content[32:]


def _link(code: bytes, part: Part) -> Functions:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    functions = {
        name: ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)(engine.get_function_address(_PREFIX + name))
        for name, count in part.functions
    }
    engine.detach()  # the code stays to the process's end: a helper may be in it even then
    return functions
