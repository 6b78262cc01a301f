"""Peak memory of one call above what is live before it.

CUDA: torch's allocator counts (`max_memory_allocated`). What libraries take past it (cuBLAS workspaces) is not in it.

CPU on Linux: the kernel counts. Free pages are handed back (`empty_cache`, `malloc_trim`), the high-water mark of the
resident set is reset (/proc/self/clear_refs), and the call's new high-water mark is read. So everything that was
touched is in it, whoever allocated it - torch, oneDNN's scratch, buffers of C++ code - where torch's profiler sees only
what its own allocator hands out. Resolution: pages, 2 MiB where transparent huge pages are in use.
"""

import ctypes
import gc
from pathlib import Path

import torch

from bench.registry import Thunk
from forge_core.kernels import empty_cache

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(thunk: Thunk, device: str) -> int | None:
    """Runs `thunk` once; None where the system does not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        live = torch.cuda.memory_allocated()
        thunk()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - live
    if not _CLEAR_REFS.exists():
        thunk()
        return None
    empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # resets VmHWM to the present VmRSS
    live = _status_bytes("VmRSS")
    thunk()
    return max(0, _status_bytes("VmHWM") - live)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{_STATUS}: has no {field}")
