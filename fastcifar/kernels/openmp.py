"""Runs a compiled loop on the threads of the OpenMP that PyTorch runs on.

    if takes(images): ...                                     # a loop may read their memory
    job = new_job(norm_fields, input=images)
    launch(functions["moments_float32"], job, parts)

These threads are awake after PyTorch's operations, and threads of our own would contend with them.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.kernels.norm_fields import WORDS

__all__ = ["is_plain", "launch", "new_job", "set_numbers", "takes"]


def is_plain(tensor: Tensor) -> bool:
    """Whether a loop may stand for an operator on it: plain memory of the CPU, in eager mode.

    Not while PyTorch compiles or traces, counts operators, or differentiates forward or in a transform of `torch.func`:
    these must see operators.
    """
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()  # it has no public name, and this neither:
        and not torch._C._are_functorch_transforms_active()
    )


def takes(images: Tensor) -> bool:
    """Whether it is plain, and channels-last."""
    return is_plain(images) and images.is_contiguous(memory_format=torch.channels_last)


def new_job(fields: ModuleType, **arrays: Tensor | NDArray[Any] | None) -> Any:
    """A job's words with the addresses of arrays, which must outlive it; `fields` says which word is which."""
    job = (ctypes.c_int64 * WORDS)()
    set_numbers(job, fields, **{name: _address(array) for name, array in arrays.items()})
    return job


def _address(array: Tensor | NDArray[Any] | None) -> int:
    if array is None:
        return 0
    return array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data


def set_numbers(job: Any, fields: ModuleType, **numbers: int) -> None:
    """Set words of a job."""
    for name, number in numbers.items():
        job[getattr(fields, name.upper())] = number


def launch(function: Callable[..., int], job: "ctypes.Array[ctypes.c_int64]", parts: int) -> None:
    """Call a function of a job with every thread that PyTorch would use, but no more than it has parts."""
    threads = min(torch.get_num_threads(), parts)
    parallel = _parallel()
    if threads > 1 and parallel is not None:
        parallel(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(job), threads, 0)  # type: ignore[arg-type]
    else:
        function(ctypes.addressof(job))


@functools.cache
def _parallel() -> Any:
    """`GOMP_parallel`; None where PyTorch has another OpenMP."""
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
