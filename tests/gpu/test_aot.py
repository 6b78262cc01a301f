"""The machine code of every Triton kernel for sm_80, sm_90 and sm_100, without a GPU; see kernels/gpu/aot.py."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from forge_core.kernels import library
from forge_core.kernels.gpu import aot
from forge_core.kernels.gpu.workload import Workload

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernels.md"
KERNEL = aot.Kernel("op: forward", "_forward", 90, 64, 0, 32 * 1024, 4, 8192, 1 << 20, 0)


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
def test_every_kernel_compiles_without_spills_and_fits(tmp_path: Path) -> None:
    # In a process of its own, which must not be one that interprets.
    result = subprocess.run(
        [sys.executable, "-m", "forge_core.kernels.gpu.aot", "--output", str(tmp_path / "kernels.md")],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    # Registers may differ with the version of Triton, the list of calls and kernels may not.
    compiled, committed = (_calls_and_kernels(path) for path in (tmp_path / "kernels.md", TABLE))
    assert compiled == committed, "docs/kernels.md lists other kernels: run `make kernels`"


def _calls_and_kernels(table: Path) -> list[list[str]]:
    return [line.split("|")[1:3] for line in table.read_text().splitlines() if line.startswith("| ")]


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
def test_spills_and_missing_wgmma_are_seen_in_the_machine_code() -> None:
    from tests.gpu import probes  # defines kernels

    spilling = Workload("probe: sum", probes.sum_in_few_registers, 1)
    (kernel,) = aot.compile_workload(spilling, 90)
    assert any("local memory" in problem for problem in kernel.problems(spilling))
    for rows, found in ((64, []), (16, ["no wgmma"])):
        matmul = Workload("probe: matmul", partial(probes.matmul, rows), 1, wgmma=("matmul_kernel",))
        (kernel,) = aot.compile_workload(matmul, 90)
        problems = kernel.problems(matmul)
        assert len(problems) == len(found) and all(text in p for text, p in zip(found, problems, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_bytes": 8}, "8 bytes a thread in local memory"),
        ({"shared_bytes": 228 * 1024}, "233472 bytes of shared memory, limit 232448"),
        ({"registers": 255, "warps": 16}, "255 registers x 16 warps do not fit"),
        ({"tensor_columns": 640}, "640 columns of tensor memory, limit 512"),
        ({}, "no wgmma instruction"),
    ],
)
def test_problems_are_named(change: dict, message: str) -> None:
    workload = Workload("op: forward", list, 1 << 20, wgmma=("_forward",))
    (problem,) = replace(KERNEL, wgmma=int(bool(change)), **change).problems(workload)
    assert problem.startswith("op: forward: _forward on sm_90: ") and message in problem


def test_occupancy_counts_registers_shared_memory_and_warps() -> None:
    assert replace(KERNEL, registers=32, shared_bytes=0).occupancy == 1.0
    assert replace(KERNEL, registers=33, shared_bytes=0).programs_per_sm == 12  # 40 registers a thread are given out
    assert KERNEL.programs_per_sm == 6  # 33 KiB each, of 228
