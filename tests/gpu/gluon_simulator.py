"""Runs a Gluon kernel on the CPU, one program after another, with the asynchrony of Hopper made as late as allowed.

Triton has no interpreter for Gluon. Here the kernel's own Python code runs with NumPy in place of the language:

- a TMA load arrives when its barrier is waited for, not before; until then the slot holds NaN that nobody may multiply;
- a wgmma reads its operands when it is waited for; loading into a slot that one still reads is an error, and so is
  an operand in registers that the wait does not keep alive;
- what a warpgroup writes to shared memory must be fenced before a wgmma or a TMA store reads it;
- a TMA store reads shared memory when it is waited for;
- a barrier waited for by the wrong parity returns at once with the NaNs, or is reported as a deadlock;
- the partitions of a warp_specialize are threads of which one runs at a time; `seed` picks which at every step.

So a kernel that is right here does not depend on a copy or a product being early, nor on who comes first. Layouts are
not checked: the compiler does that.
"""

import random
import sys
import threading
import types
from collections.abc import Callable, Sequence
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
    """A TMA descriptor: blocks of a tensor, zero beyond its edges."""

    layout = None

    def __init__(self, tensor: Tensor, block: list[int]) -> None:
        self.tensor, self.block_type, self.dtype = tensor, types.SimpleNamespace(shape=block), tensor.dtype

    def part(self, at: list[int]) -> Tensor:
        return self.tensor[tuple(slice(a, a + n) for a, n in zip(at, self.block_type.shape, strict=True))]

    def read(self, at: list[int]) -> np.ndarray:
        block, part = np.zeros(self.block_type.shape, np.float32), self.part(at)
        block[tuple(slice(0, n) for n in part.shape)] = part.float().numpy()
        return block


class Slots:
    """What is known of an allocation: products that have yet to read each slot, and copies that have yet to arrive."""

    def __init__(self, count: int) -> None:
        self.users, self.arriving = np.zeros(count, int), np.zeros(count, int)
        self.unfenced: dict[tuple[int, int], bool] = {}  # (slot, thread that wrote it): whether that changed it

    def wrote(self, slot: int) -> bool:
        """Whether a product or copy of this thread may miss what was written to a slot."""
        me = threading.get_ident()
        return any(at == slot and (changed or who == me) for (at, who), changed in self.unfenced.items())


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: np.ndarray, slots: Slots, dtype: Any, slot: int = 0) -> None:
        self.data, self.slots, self.dtype, self.slot = data, slots, dtype, slot

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def _view(self, data: np.ndarray) -> "Shared":
        assert np.shares_memory(data, self.data)
        return Shared(data, self.slots, self.dtype, self.slot)

    def index(self, slot: int) -> "Shared":
        return Shared(self.data[slot], self.slots, self.dtype, slot)

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return self._view(self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return self._view(self.data.transpose(order))

    def reshape(self, shape: list[int]) -> "Shared":
        return self._view(self.data.reshape(shape))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> "Shared":
        return self._view(self.data.reshape(-1)[: int(np.prod(shape))].reshape(shape))

    def store(self, value: Array) -> None:
        same = np.array_equal(self.data, value, equal_nan=True)
        assert same or not self.slots.users[self.slot], "a store changes a slot that a product still reads"
        assert not self.slots.arriving[self.slot], "a store into a slot that a copy is still writing"
        self.data[...] = value
        self.slots.unfenced[self.slot, threading.get_ident()] = not same

    def load(self, layout: Any) -> Array:
        assert not self.slots.arriving[self.slot], "a load from a slot that a copy is still writing"
        return self.data.copy().view(Array)


class Product:
    """A wgmma in flight."""

    def __init__(self, a: Any, b: Shared, acc: "Accumulator") -> None:
        self.a, self.b, self.acc = a, b, acc


class Accumulator:
    """A sum with products that are still to be computed."""

    def __init__(self, value: Array) -> None:
        self.value, self.pending = value, 0


class Barrier:
    def __init__(self) -> None:
        self.count = self.arrivals = self.completed = self.bytes = 0
        self.copies: list[tuple[Descriptor, list[int], Shared]] = []

    def settle(self) -> None:
        """Ends the phase if everything that it waits for has come."""
        if self.arrivals == 0 and self.bytes == 0 and not self.copies:
            self.arrivals, self.completed = self.count, self.completed + 1


class Scheduler:
    """Runs one of several threads at a time."""

    def __init__(self, seed: int) -> None:
        self.random, self.stop = random.Random(seed), False
        self.batons: dict[int, threading.Semaphore] = {}
        self.blocked: set[int] = set()
        self.here = threading.local()

    def run(self, parts: Sequence[Callable[[], Any]]) -> None:
        errors: list[BaseException] = []

        def work(i: int, part: Callable[[], Any]) -> None:
            self.here.part = i
            self.batons[i].acquire()
            try:
                if not self.stop:
                    part()
            except BaseException as error:
                errors.append(error)
                self.stop = True
            del self.batons[i]
            self._pass_on()

        self.batons = {i: threading.Semaphore(0) for i in range(len(parts))}
        threads = [threading.Thread(target=work, args=(i, part)) for i, part in enumerate(parts)]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _pass_on(self) -> None:
        waiting = [i for i in self.batons if self.stop or i not in self.blocked]
        if not waiting and self.batons:
            self.stop = True
            waiting = list(self.batons)
        if waiting:
            self.batons[self.random.choice(waiting)].release()

    def step(self, blocked: bool = False) -> None:
        """Lets another thread run; with `blocked` until one has made progress."""
        if not self.batons:
            assert not blocked, "deadlock: what the barrier waits for never comes"
            return
        me = self.here.part
        if blocked:
            self.blocked.add(me)
        else:
            self.blocked.clear()
        baton = self.batons[me]
        self._pass_on()
        baton.acquire()
        assert not self.stop, "deadlock: every partition waits for a barrier, or another one has failed"


class Machine:
    """What one program sees: the modules `gl`, `tma` and `mbarrier`, and the state of its copies."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.scheduler = Scheduler(seed)
        self.stores: list[tuple[Descriptor, list[int], Shared]] = []
        self.products: dict[Any, list[Product]] = {}
        self.shared: list[Shared] = []
        self.fenced = True
        nothing = lambda *args, **options: None  # noqa: E731
        same = lambda value, *args, **options: value  # noqa: E731
        view = lambda function: lambda *args: function(*args).view(Array)  # noqa: E731
        self.names = {
            "gl": types.SimpleNamespace(
                program_id=lambda axis: program, num_programs=lambda axis: programs, cdiv=lambda a, b: -(-a // b),
                minimum=np.minimum, maximum=np.maximum, static_range=range, where=view(np.where), max=view(np.max),
                sum=view(np.sum), exp2=view(np.exp2), log2=view(np.log2), cast=same, convert_layout=same,
                arange=lambda a, b, layout=None: np.arange(a, b).view(Array), float32=np.float32, int64=np.int64,
                uint32=np.uint32,
                zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Array),
                full=lambda shape, value, dtype, layout: np.full(shape, value, dtype).view(Array),
                load=self.load, store=self.store, set_auto_layout=same, constexpr=same,
                allocate_shared_memory=self.allocate, NVMMADistributedLayout=nothing, SliceLayout=nothing,
                DotOperandLayout=nothing, DistributedLinearLayout=nothing, warp_specialize=self.warp_specialize,
            ),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: Barrier, init=self.init, expect=self.expect, wait=self.wait, arrive=self.arrive
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
        self.shared.append(Shared(np.full(shape, np.nan, np.float32), Slots(shape[0]), dtype))
        return self.shared[-1]

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0) -> Any:
        at, inside = np.broadcast_arrays(pointer.offset, mask)
        values = pointer.memory[torch.from_numpy(np.where(inside, at, 0))]
        values = values.float() if values.is_floating_point() else values
        if values.ndim == 0:
            return values.item()
        return np.where(inside, values.numpy(), other).astype(values.numpy().dtype).view(Array)

    def store(self, pointer: Pointer, values: Array, mask: Any = True) -> None:
        at, inside, values = np.broadcast_arrays(pointer.offset, mask, values)
        pointer.memory[torch.from_numpy(at[inside].astype(np.int64))] = torch.from_numpy(
            np.asarray(values[inside], np.float32)
        ).to(pointer.memory.dtype)

    def warp_specialize(self, parts: list[tuple[Any, tuple]], warps: list[int], registers: list[int]) -> None:
        assert self.fenced, "partitions start before what was made of barriers is fenced"
        self.scheduler.run([lambda function=function, args=args: function(*args) for function, args in parts])

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.arrivals = count
        self.fenced = False

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        self.arrive(barrier)

    def arrive(self, barrier: Barrier) -> None:
        assert barrier.arrivals > 0, "a barrier is arrived at more often than it counts before its phase ends"
        barrier.arrivals -= 1
        barrier.settle()
        self.scheduler.step()

    def copy_in(self, source: Descriptor, at: list[int], barrier: Barrier, target: Shared) -> None:
        assert target.slots.users[target.slot] == 0, "a load overwrites a slot that a product still reads"
        assert not target.slots.wrote(target.slot), "a load overwrites what was written without a fence"
        target.data[...] = np.nan
        target.slots.arriving[target.slot] += 1
        barrier.bytes -= target.data.size * source.dtype.itemsize
        barrier.copies.append((source, list(at), target))
        self.scheduler.step()

    def wait(self, barrier: Barrier, phase: int) -> None:
        while barrier.completed % 2 == phase:
            if barrier.arrivals == 0 and barrier.bytes == 0:  # the copies arrive now, because they are waited for
                for source, at, target in barrier.copies:
                    target.data[...] = source.read(at)
                    target.slots.arriving[target.slot] -= 1
                barrier.copies = []
                barrier.settle()
            else:
                self.scheduler.step(blocked=True)
        self.scheduler.step()

    def _mine(self) -> list[Product]:
        return self.products.setdefault(threading.get_ident(), [])

    def multiply(self, a: Any, b: Shared, acc: Any, is_async: bool, use_acc: bool = True) -> Accumulator:
        assert is_async, "only asynchronous products are simulated"
        for operand in (a, b):
            if isinstance(operand, Shared):
                assert not operand.slots.arriving[operand.slot], "a product of a slot that was not waited for"
                assert not operand.slots.wrote(operand.slot), "a product reads what was written without a fence"
                operand.slots.users[operand.slot] += 1
        acc = acc if isinstance(acc, Accumulator) else Accumulator(acc if use_acc else np.zeros_like(acc))
        acc.pending += 1
        self._mine().append(Product(a, b, acc))
        self.scheduler.step()
        return acc

    def multiply_wait(self, outstanding: int, deps: tuple[Any, ...]) -> Any:
        mine = self._mine()
        while len(mine) > outstanding:
            product = mine.pop(0)
            a, b, acc = product.a, product.b, product.acc
            in_registers = not isinstance(a, Shared)
            assert any(dep is acc for dep in deps), "the wait for a product does not return its sum"
            assert not in_registers or any(dep is a for dep in deps), "registers of a product in flight may be reused"
            acc.value = acc.value + ((a if in_registers else a.data) @ b.data).view(Array)
            acc.pending -= 1
            for operand in (a, b):
                if isinstance(operand, Shared):
                    operand.slots.users[operand.slot] -= 1
        self.scheduler.step()
        results = tuple(d.value if isinstance(d, Accumulator) and not d.pending else d for d in deps)
        return results if len(results) > 1 else results[0]

    def fence(self) -> None:
        self.fenced = True
        for shared in self.shared:
            kept = {key: changed for key, changed in shared.slots.unfenced.items() if key[1] != threading.get_ident()}
            shared.slots.unfenced = kept

    def copy_out(self, target: Descriptor, at: list[int], source: Shared) -> None:
        assert not source.slots.wrote(source.slot), "a store reads shared memory without a fence after it was written"
        self.stores.append((target, list(at), source))

    def store_wait(self, outstanding: int) -> None:
        while len(self.stores) > outstanding:
            target, at, source = self.stores.pop(0)
            part = target.part(at)
            part.copy_(torch.from_numpy(source.data[tuple(slice(0, n) for n in part.shape)]))


def run(module: types.ModuleType, kernel: Any, programs: int, *arguments: Any, seed: int = 0, **constants: Any) -> None:
    """Runs `kernel` of `module` for every program; functions of its package that it calls run in the same way."""
    for program in range(programs):
        machine = Machine(program, programs, seed)
        _scope(module, machine.names, {})[kernel.fn.__name__](*arguments, **constants)
        assert not machine.stores, "the program ends before its last store"
        assert not any(machine.products.values()), "the program ends before its last product"


def _scope(module: types.ModuleType, names: dict[str, Any], scopes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the functions of a module see: `names` for the language, each other, and those of modules beside it."""
    if module.__name__ in scopes:
        return scopes[module.__name__]
    scope = scopes[module.__name__] = dict(vars(module)) | names
    for name, value in vars(module).items():
        function = getattr(value, "fn", None)
        if isinstance(function, types.FunctionType) and function.__module__.startswith("forge_core."):
            around = _scope(sys.modules[function.__module__], names, scopes)
            scope[name] = types.FunctionType(
                function.__code__, around, function.__name__, function.__defaults__, function.__closure__
            )
    return scope
