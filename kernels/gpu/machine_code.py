"""What a compiled Triton or Gluon kernel holds, by its binary: resources and the instructions that its source asks for.

Triton can compile a kernel to nothing without an error: one that wants more tensor memory than there is becomes a bare
trap. So the gate asks of the machine code what the kernel's own TTGIR says that it does: loads, stores, matmuls.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FEWEST_INSTRUCTIONS = 32  # of a kernel that does something; a trap and its padding are 16
TRAP = "BPT.TRAP"

_MMA = ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA")
_SCALAR_FMA = ("FFMA", "FFMA2", "DFMA", "HFMA2")
# Operations of TTGIR, and the instructions of which one must be there for them.
_LOADS = r"tt\.(?:load|descriptor_load|descriptor_gather)|async_copy_global_to_local|async_tma_(?:copy_global|gather)"
_STORES = r"tt\.(?:store|descriptor_store|descriptor_scatter|atomic_\w+)|async_tma_(?:copy_local|scatter|reduce)"
_CLASSES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("load from global memory", _LOADS, ("LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP")),
    (
        "store to global memory",
        _STORES,
        ("STG", "ST", "UTMASTG", "UTMAREDG", "RED", "REDG", "ATOM", "ATOMG", "UBLKRED"),
    ),
)
_MATMULS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("wgmma", r"ttng\.warp_group_dot .*", ("HGMMA", "IGMMA", "QGMMA", "BGMMA")),
    ("tcgen05.mma", r"ttng\.tc_gen5_mma\w* .*", ("UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA")),
    ("mma", r"tt\.dot(?:_scaled)? .*-> tensor<[^<>]*#mma\w*>", _MMA),
    ("multiply-add", r"tt\.dot .*-> tensor<[^<>]*#blocked\w*>", _SCALAR_FMA),
)


@dataclass(frozen=True)
class MachineCode:
    """A kernel's binary in numbers."""

    registers: int  # a thread
    local_bytes: int  # a thread: spilled registers, and arrays indexed at run time
    instructions: Mapping[str, int]  # full name, such as LDG.E.128 -> how often it stands in the code; without NOP

    @property
    def total(self) -> int:
        """Instructions in the code."""
        return sum(self.instructions.values())

    def count(self, *names: str) -> int:
        """Instructions of these names, whatever their modifiers."""
        return sum(count for name, count in self.instructions.items() if name.split(".")[0] in names)


@functools.lru_cache(maxsize=64)
def read(cubin: bytes) -> MachineCode:
    """Disassembles a kernel with the tool that comes with Triton.

    Raises:
        ValueError: the tool's answer is not understood.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = [
            subprocess.run([_tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        ]
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text[0])
    if found is None:
        raise ValueError(f"cuobjdump: expected a line with REG, STACK and LOCAL, got {text[0]!r}")
    registers, stack, local = map(int, found.groups())
    # /*0a10*/  @!P0 LDG.E.128 R4, ...
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text[1], re.MULTILINE)
    if not names:
        raise ValueError(f"cuobjdump: expected machine code, got {text[1][:200]!r}")
    return MachineCode(registers, stack + local, Counter(name for name in names if name != "NOP"))


def serialized(ptx: str) -> str:
    """Why ptxas gives up the asynchrony of wgmma in this code, "" if it does not; it says so in a remark only.

    Such a kernel is right and slow: each instruction is waited for before the next one.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [_tool("ptxas"), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"wgmma\.mma_async instructions are serialized due to (.*?)(?: in the function.*)?$", text, re.M)
    return found[1] if found else ""


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def problems(code: MachineCode, ttgir: str) -> list[str]:
    """What the machine code lacks of what the kernel's TTGIR asks for."""
    found = []
    if code.total < FEWEST_INSTRUCTIONS:
        trap = f", one of them {TRAP}" if TRAP in code.instructions else ""
        found.append(f"{code.total} instructions{trap}, expected at least {FEWEST_INSTRUCTIONS}")
    for what, pattern, names in _CLASSES:
        if re.search(pattern, ttgir) and not code.count(*names):
            found.append(f"no instruction that is a {what}, expected one of {', '.join(names)}")
    for what, pattern, names in _MATMULS:
        asked = len(re.findall(pattern, ttgir, re.MULTILINE))
        if code.count(*names) < asked:
            found.append(
                f"{code.count(*names)} instructions for {asked} {what} operations, expected {', '.join(names)}"
            )
    return found
