"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, checks the machine code, and tables it.

`python -m forge_core.kernels.gpu.aot [--output docs/kernels.md] [op ...]` calls each op's `workloads()`. The launchers
run as always, on tensors without memory and under a driver that compiles instead of launching: what is checked is what
a GPU would be given, down to alignment hints and the grid. Compiled kernels stay in Triton's cache, ~/.triton/cache.
"""

import argparse
import concurrent.futures
import importlib
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..registry import available_backends
from . import machine_code
from .workload import Workload

OPS = tuple(op for op, names in available_backends().items() if "triton" in names)
ARCHITECTURES = (80, 90, 100)

# Shared memory that one program can have, and that a multiprocessor has for all of its programs (1 KiB of it reserved
# for each): CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
TENSOR_COLUMNS = 512  # of a program; Triton compiles a kernel that wants more to a trap
REGISTERS_PER_SM, WARPS_PER_SM, PROGRAMS_PER_SM = 65536, 64, 32

# H200: 132 multiprocessors, measured ceilings.
SMS, BYTES_PER_SECOND, FLOPS_PER_SECOND = 132, 4.3e12, 790e12


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of a workload."""

    workload: str
    function: str
    architecture: int
    registers: int  # a thread
    local_bytes: int  # a thread: spilled registers, and arrays indexed at run time
    shared_bytes: int  # a program
    warps: int  # a program
    programs: int  # of the grid
    bytes: int  # of the tensors among the arguments
    wgmma: int  # instructions
    tensor_columns: int = 0  # of tensor memory (sm_100)
    lacking: tuple[str, ...] = ()  # what the machine code lacks of what the kernel's source asks for
    serialized: str | None = None  # why ptxas waits for every wgmma, "" where it does not; None where nobody asked

    @property
    def programs_per_sm(self) -> int:
        """Programs that a multiprocessor can hold at a time."""
        registers = 256 * math.ceil(self.registers * 32 / 256) * self.warps
        return min(
            PROGRAMS_PER_SM,
            WARPS_PER_SM // self.warps,
            REGISTERS_PER_SM // max(registers, 1),
            SHARED_PER_SM[self.architecture] // (self.shared_bytes + 1024),
        )

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's 64 warps."""
        return self.programs_per_sm * self.warps / WARPS_PER_SM

    def problems(self, workload: Workload) -> list[str]:
        """What is wrong with the machine code."""
        found = list(self.lacking)
        if self.local_bytes:
            found.append(f"{self.local_bytes} bytes a thread in local memory (spills), expected none")
        if self.shared_bytes > SHARED_LIMIT[self.architecture]:
            found.append(f"{self.shared_bytes} bytes of shared memory, limit {SHARED_LIMIT[self.architecture]}")
        elif self.programs_per_sm == 0:
            found.append(f"{self.registers} registers x {self.warps} warps do not fit a multiprocessor")
        if self.tensor_columns > TENSOR_COLUMNS:
            found.append(f"{self.tensor_columns} columns of tensor memory, limit {TENSOR_COLUMNS}")
        if self.architecture == 90 and self.function in workload.wgmma and not self.wgmma:
            found.append("no wgmma instruction, expected a Hopper matmul")
        if self.serialized and self.function in workload.asynchronous:
            found.append(f"wgmma instructions are serialized due to {self.serialized}")
        return [f"{self.workload}: {self.function} on sm_{self.architecture}: {text}" for text in found]


class CompileOnly:
    """A driver for Triton without a device. The target counts as its number: Triton keeps kernels per device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        """The key of Triton's cache of compiled kernels."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """No stream."""
        return 0

    def get_current_target(self) -> Any:
        """What Triton compiles for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@contextmanager
def _launches(architecture: int) -> Iterator[list[tuple[str, Any, tuple, dict]]]:
    """Collects (function, compiled kernel, grid, arguments) of the launches inside, instead of running them."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[tuple[str, Any, tuple, dict]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        size = grid(arguments) if callable(grid) else grid
        launches.append((self.fn.__name__, compiled, size, arguments))
        return compiled

    driver.set_active(CompileOnly(architecture))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = None


def workloads(op: str) -> list[Workload]:
    """The workloads of an op's module."""
    return importlib.import_module(f".{op}", __package__).workloads()


def compile_workload(workload: Workload, architecture: int) -> list[Kernel]:
    """Compiles what a workload launches on one architecture."""
    if architecture not in workload.architectures:
        return []
    with _launches(architecture) as launches:
        workload.call()
    if not launches:
        raise ValueError(f"{workload.name}: launches no kernel")
    kernels = []
    for function, compiled, grid, arguments in launches:
        code = machine_code.read(compiled.asm["cubin"])
        values = [getattr(value, "base", value) for value in arguments.values()]  # the tensor of a TMA descriptor
        tensors = [value for value in values if hasattr(value, "data_ptr")]
        kernels.append(
            Kernel(
                workload=workload.name,
                function=function,
                architecture=architecture,
                registers=code.registers,
                local_bytes=code.local_bytes,
                shared_bytes=compiled.metadata.shared,
                warps=compiled.metadata.num_warps,
                programs=math.prod(grid),
                bytes=sum(t.numel() * t.element_size() for t in tensors),
                tensor_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
                wgmma=code.count("HGMMA"),
                lacking=tuple(machine_code.problems(code, compiled.asm["ttgir"])),
                serialized=machine_code.serialized(compiled.asm["ptx"])
                if function in workload.wgmma and architecture == 90
                else None,
            )
        )
    return kernels


def _compile_job(op: str, index: int, architecture: int) -> list[Kernel]:
    return compile_workload(workloads(op)[index], architecture)


def compile_all(ops: Sequence[str] = OPS, architectures: Sequence[int] = ARCHITECTURES) -> list[Kernel]:
    """Compiles all workloads in as many processes as there are cores; each has one Triton context."""
    jobs = [(op, i, a) for op in ops for i in range(len(workloads(op))) for a in architectures]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return [kernel for kernels in pool.map(_compile_job, *zip(*jobs, strict=True)) for kernel in kernels]


def problems(kernels: Sequence[Kernel], ops: Sequence[str] = OPS) -> list[str]:
    """Every problem of every kernel, one line each."""
    by_name = {workload.name: workload for op in ops for workload in workloads(op)}
    return [line for kernel in kernels for line in kernel.problems(by_name[kernel.workload])]


def predicted_seconds(kernels: Sequence[Kernel], flops: int) -> float:
    """Time on an H200 of a workload's kernels (sm_90), if each met the ceilings: a bound, not a measurement.

    A kernel takes its bytes over the bandwidth; the matmuls of the workload take at least their operations over the
    peak. The last, partly filled wave of programs counts as a full one.
    """
    seconds = 0.0
    largest = max(kernels, key=lambda kernel: kernel.bytes)
    for kernel in kernels:
        waves = kernel.programs / (SMS * max(kernel.programs_per_sm, 1))
        ideal = max(kernel.bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND if kernel is largest else 0.0)
        seconds += ideal * (math.ceil(waves) / waves if waves > 1 else 1.0)
    return seconds


def table(kernels: Sequence[Kernel], ops: Sequence[str] = OPS) -> str:
    """docs/kernels.md."""
    text = [HEADER]
    for op in ops:
        columns = (
            "call", "kernel", "warps", "registers", "shared KiB", "warps in flight", "wgmma", "predicted us",
            "floor us",
        )  # fmt: skip
        text += [f"\n## {op}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for workload in workloads(op):
            mine = [kernel for kernel in kernels if kernel.workload == workload.name]
            hopper = [kernel for kernel in mine if kernel.architecture == 90]
            floor = max(workload.bytes / BYTES_PER_SECOND, workload.flops / FLOPS_PER_SECOND)
            predicted = f"{predicted_seconds(hopper, workload.flops) * 1e6:.1f}" if hopper else "not for sm_90"
            times = f"{predicted} | {floor * 1e6:.1f}"
            launched = len(mine) // len(workload.architectures)
            rows: dict[tuple[str, ...], int] = {}  # a kernel launched several times has one row
            for i in range(launched):
                each = mine[i::launched]
                row = (
                    each[0].function.strip("_"),
                    str(each[0].warps),
                    _listed(kernel.registers for kernel in each),
                    _listed(f"{kernel.shared_bytes / 1024:.0f}" for kernel in each),
                    _listed(f"{100 * kernel.occupancy:.0f} %" for kernel in each),
                    "".join("serialized" if k.serialized else "asynchronous" for k in each if k.serialized is not None),
                )
                rows[row] = rows.get(row, 0) + 1
            for i, ((function, *properties), count) in enumerate(rows.items()):
                name = f"`{function}`" + (f" x {count}" if count > 1 else "")
                call = workload.name.split(": ", 1)[1] if i == 0 else ""
                text.append(f"| {' | '.join([call, name, *properties, times if i == 0 else ' | '])} |")
    return "\n".join(text) + "\n"


HEADER = """# Kernels, compiled ahead of time

Written by `make kernels` (`python -m forge_core.kernels.gpu.aot`), which compiles what every listed call launches for
sm_80, sm_90 and sm_100 with Triton's own compiler and reads the machine code. `tests/gpu/test_aot.py` fails on a spill,
on too much shared memory, on a matmul kernel without `wgmma` on sm_90, on one of attention or Gluon's that serializes
it, and on machine code that lacks the loads, stores or matmul instructions that the kernel's TTGIR asks for (Triton
compiles what exceeds tensor memory to a bare trap).

No figure here was measured. **Floor**: each input read once and each output written once at 4.3 TB/s, or the matmuls at
790 TFLOP/s, whichever is longer. **Predicted**: the bytes of each kernel's own arguments (scratch included) at the same
ceilings, the last wave of programs counted as a full one. A running kernel can only be slower. **Warps in flight**:
share of the 64 that a multiprocessor can hold, by registers and shared memory. **wgmma**: whether ptxas leaves the
matmul instructions of sm_90 asynchronous or waits for each, which it only remarks on. Where sm_80, sm_90 and sm_100
differ, the three values stand in this order."""


def _listed(values: Any) -> str:
    shown = [str(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def main() -> int:
    """Compiles, writes the table and prints the problems."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("ops", nargs="*", default=list(OPS), help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--output", type=Path, help="write the table here instead of printing it")
    arguments = parser.parse_args()
    kernels = compile_all(arguments.ops)
    text = table(kernels, arguments.ops)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)
    found = problems(kernels, arguments.ops)
    print("\n".join(found) or f"{len(kernels)} kernels: no spills, shared memory fits", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
