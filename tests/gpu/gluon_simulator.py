"""Runs a Gluon kernel on the CPU, one program after another, with the asynchrony of Hopper made as late as allowed.

Triton has no interpreter for Gluon. Here the kernel's own Python code runs with NumPy in place of the language:

- a TMA load arrives when its barrier is waited for, not before; until then the slot holds NaN;
- a wgmma reads its operands when it is waited for; loading into a slot that one still reads is an error;
- a TMA store reads shared memory when it is waited for, and must follow a fence;
- a barrier waited for by the wrong parity returns at once with the NaNs, or is reported as a deadlock.

So a kernel that is right here does not depend on a copy or a product being early. Layouts are not checked.
"""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Array(np.ndarray):
    """A distributed tensor."""

    def to(self, dtype: Any) -> "Array":
        if isinstance(dtype, torch.dtype):  # rounded, and kept in float32
            return torch.from_numpy(np.asarray(self)).to(dtype).float().numpy().view(Array)
        return self.astype(dtype)


class Pointer:
    """Global memory with an offset or an array of them."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory.reshape(-1), offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)


class Descriptor:
    """A TMA descriptor: blocks of a matrix, zero beyond its edges."""

    layout = None

    def __init__(self, matrix: Tensor, block: list[int]) -> None:
        self.matrix, self.block_type, self.dtype = matrix, types.SimpleNamespace(shape=block), matrix.dtype

    def part(self, at: list[int]) -> Tensor:
        rows, columns = self.block_type.shape
        return self.matrix[at[0] : at[0] + rows, at[1] : at[1] + columns]

    def read(self, at: list[int]) -> np.ndarray:
        block, part = np.zeros(self.block_type.shape, np.float32), self.part(at)
        block[: part.shape[0], : part.shape[1]] = part.float().numpy()
        return block


class Shared:
    """Shared memory, or a view of it; `users` counts the products that have yet to read each slot of the allocation."""

    def __init__(self, data: np.ndarray, users: np.ndarray, slot: int = 0) -> None:
        self.data, self.users, self.slot, self.fenced = data, users, slot, True

    def index(self, slot: int) -> "Shared":
        return Shared(self.data[slot], self.users, slot)

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)], self.users, self.slot)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.transpose(order), self.users, self.slot)

    def store(self, value: Array) -> None:
        self.data[...], self.fenced = value, False

    def load(self, layout: Any) -> Array:
        return self.data.copy().view(Array)


class Accumulator:
    """A sum with products that are still to be read from shared memory."""

    def __init__(self, value: Array, pending: list[tuple[Shared, Shared]]) -> None:
        self.value, self.pending = value, pending


class Barrier:
    def __init__(self) -> None:
        self.completed, self.missing, self.copies = 0, 0, []


class Machine:
    """What one program sees: the modules `gl`, `tma` and `mbarrier`, and the state of its copies."""

    def __init__(self, program: int, programs: int) -> None:
        self.stores: list[tuple[Descriptor, list[int], Shared]] = []
        self.shared: list[Shared] = []
        nothing = lambda *args, **options: None  # noqa: E731
        self.names = {
            "gl": types.SimpleNamespace(
                program_id=lambda axis: program, num_programs=lambda axis: programs, cdiv=lambda a, b: -(-a // b),
                minimum=min, static_range=range, where=lambda c, a, b: np.where(c, a, b).view(Array),
                arange=lambda a, b, layout=None: np.arange(a, b).view(Array), float32=np.float32, int64=np.int64,
                zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Array),
                load=self.load, set_auto_layout=lambda value, layout: value,
                allocate_shared_memory=self.allocate, NVMMADistributedLayout=nothing, SliceLayout=nothing,
            ),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: Barrier, init=nothing, expect=self.expect, wait=self.wait
            ),
            "tma": types.SimpleNamespace(
                async_copy_global_to_shared=self.copy_in, async_copy_shared_to_global=self.copy_out,
                store_wait=self.store_wait,
            ),
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.multiply_wait, "fence_async_shared": self.fence,
        }  # fmt: skip

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if layout is Barrier:
            barriers = [Barrier() for _ in range(shape[0])]
            return types.SimpleNamespace(index=lambda i: barriers[i])
        self.shared.append(Shared(np.full(shape, np.nan, np.float32), np.zeros(shape[0], int)))
        return self.shared[-1]

    def load(self, pointer: Pointer, mask: np.ndarray, other: float) -> Array:
        at, inside = np.broadcast_arrays(pointer.offset, mask)
        values = pointer.memory[torch.from_numpy(np.where(inside, at, 0))]
        values = values.float() if values.is_floating_point() else values
        return np.where(inside, values.numpy(), other).astype(values.numpy().dtype).view(Array)

    def expect(self, barrier: Barrier, size: int) -> None:
        assert barrier.missing == 0 and not barrier.copies, "a barrier expects bytes again before it was waited for"
        barrier.missing = size

    def copy_in(self, source: Descriptor, at: list[int], barrier: Barrier, target: Shared) -> None:
        assert target.users[target.slot] == 0, "a load overwrites a slot that a product still reads"
        target.data[...] = np.nan
        barrier.missing -= target.data.size * 2
        barrier.copies.append((source, list(at), target))

    def wait(self, barrier: Barrier, phase: int) -> None:
        if barrier.completed % 2 != phase:
            return  # an older completion answers
        assert barrier.copies and barrier.missing == 0, "deadlock: the bytes that the barrier expects never come"
        for source, at, target in barrier.copies:
            target.data[...] = source.read(at)
        barrier.copies, barrier.completed = [], barrier.completed + 1

    def multiply(self, a: Shared, b: Shared, acc: Any, is_async: bool) -> Accumulator:
        for operand in (a, b):
            operand.users[operand.slot] += 1
        before = acc if isinstance(acc, Accumulator) else Accumulator(acc, [])
        return Accumulator(before.value, [*before.pending, (a, b)])

    def multiply_wait(self, outstanding: int, deps: tuple[Accumulator]) -> Any:
        (acc,) = deps
        while len(acc.pending) > outstanding:
            a, b = acc.pending.pop(0)
            acc.value = acc.value + (a.data @ b.data).view(Array)
            for operand in (a, b):
                operand.users[operand.slot] -= 1
        return acc if outstanding else acc.value

    def fence(self) -> None:
        for shared in self.shared:
            shared.fenced = True

    def copy_out(self, target: Descriptor, at: list[int], source: Shared) -> None:
        assert source.fenced, "a store reads shared memory without a fence after it was written"
        self.stores.append((target, list(at), source))

    def store_wait(self, outstanding: int) -> None:
        while len(self.stores) > outstanding:
            target, at, source = self.stores.pop(0)
            part = target.part(at)
            part.copy_(torch.from_numpy(source.data[: part.shape[0], : part.shape[1]]))


def run(module: types.ModuleType, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Runs `kernel` of `module` for every program; functions of the module that it calls run in the same way."""
    for program in range(programs):
        machine = Machine(program, programs)
        scope = dict(vars(module)) | machine.names
        for name, value in vars(module).items():
            function = getattr(value, "fn", None)
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                scope[name] = _in_scope(function, scope)
        scope[kernel.fn.__name__](*arguments, **constants)
        assert not machine.stores, "the program ends before its last store"


def _in_scope(function: Callable[..., Any], scope: dict[str, Any]) -> Callable[..., Any]:
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
