"""The machine code of every Triton kernel for sm_80, sm_90 and sm_100, without a GPU; see kernels/gpu/aot.py."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from forge_core.kernels import library
from forge_core.kernels.gpu import aot, machine_code
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


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("early", [False, True])
def test_serialized_matmuls_are_seen(early: bool) -> None:
    from tests.gpu import probes

    name = ("two_sums_kernel",)
    workload = Workload("probe: sums", partial(probes.two_sums, early), 1, wgmma=name, asynchronous=name)
    (kernel,) = aot.compile_workload(workload, 90)
    problems = kernel.problems(workload)
    assert ("serialized due to non wgmma instructions" in "".join(problems)) == early and len(problems) == early


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
def test_a_kernel_that_compiled_to_a_trap_is_seen() -> None:
    from tests.gpu import probes

    for columns, found in (
        (64, []),
        (
            128,
            [
                "3 instructions, one of them BPT.TRAP",
                "no instruction that is a load from global memory",
                "no instruction that is a store to global memory",
                "0 instructions for 10 tcgen05.mma operations",
                "640 columns of tensor memory",
            ],
        ),
    ):
        workload = Workload("probe: sums", partial(probes.five_sums, columns), 1)
        (kernel,) = aot.compile_workload(workload, 100)
        problems = kernel.problems(workload)
        assert len(problems) == len(found), problems
        assert all(text in problem for text, problem in zip(found, problems, strict=True)), problems


@pytest.mark.parametrize(
    ("ttgir", "lacks"),
    [
        ("%1 = tt.load %0 : tensor<64x!tt.ptr<f32>, #blocked>", "LDG"),
        ("ttng.async_tma_copy_global_to_local %1[%2] %3", "UTMALDG"),
        ("tt.store %0, %1 : tensor<64x!tt.ptr<f32>, #blocked>", "STG"),
        ("ttng.async_tma_copy_local_to_global %1[%2] %3", "UTMASTG"),
        ("%2 = ttng.warp_group_dot %0, %1, %acc : !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32, #mma>", "HGMMA"),
        ("%2 = ttng.tc_gen5_mma %0, %1, %2[], %true, %true : !ttg.memdesc<64x64xbf16>", "UTCHMMA"),
        ("%2 = tt.dot %0, %1, %acc : tensor<16x16xbf16> -> tensor<16x16xf32, #mma1> loc(#loc4)", "HMMA"),
        ("%2 = tt.dot %0, %1, %acc, inputPrecision = ieee : tensor<16x16xf32> -> tensor<16x16xf32, #blocked>", "FFMA"),
    ],
)
def test_each_class_of_operation_has_its_instructions(ttgir: str, lacks: str) -> None:
    others = {"LDG.E": 1, "STG.E": 1, "HGMMA.64x64": 1, "UTCHMMA": 1, "HMMA.16816": 1, "FFMA": 1}
    replaced = {"UTMALDG": "LDG.E", "UTMASTG": "STG.E"}.get(lacks, lacks)
    without = {name: count for name, count in others.items() if name.split(".")[0] != replaced.split(".")[0]}
    code = machine_code.MachineCode(32, 0, {"IADD3": 100, **without})
    (problem,) = machine_code.problems(code, ttgir)
    assert lacks in problem
    assert machine_code.problems(replace(code, instructions={**code.instructions, lacks: 1}), ttgir) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_bytes": 8}, "8 bytes a thread in local memory"),
        ({"shared_bytes": 228 * 1024}, "233472 bytes of shared memory, limit 232448"),
        ({"registers": 255, "warps": 16}, "255 registers x 16 warps do not fit"),
        ({"lacking": ("no instruction that is a store to global memory",)}, "no instruction that is a store"),
        ({"tensor_columns": 640}, "640 columns of tensor memory, limit 512"),
        ({}, "no wgmma instruction"),
        ({"serialized": "a reason"}, "wgmma instructions are serialized due to a reason"),
    ],
)
def test_problems_are_named(change: dict, message: str) -> None:
    workload = Workload("op: forward", list, 1 << 20, wgmma=("_forward",), asynchronous=("_forward",))
    (problem,) = replace(KERNEL, wgmma=int(bool(change)), **change).problems(workload)
    assert problem.startswith("op: forward: _forward on sm_90: ") and message in problem


def test_occupancy_counts_registers_shared_memory_and_warps() -> None:
    assert replace(KERNEL, registers=32, shared_bytes=0).occupancy == 1.0
    assert replace(KERNEL, registers=33, shared_bytes=0).programs_per_sm == 12  # 40 registers a thread are given out
    assert KERNEL.programs_per_sm == 6  # 33 KiB each, of 228
