"""What is measured: workloads with their floor in FLOPs and bytes, and the candidates that compete on each.

A module in bench/ops registers its workloads with the `workload` decorator. The decorated function builds the inputs
once and returns the candidates that share them: `forge` first, then the peers. A peer that cannot run here is given as
`Missing(reason)` and is listed as such in every report, never dropped.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured on this machine, and why."""

    reason: str


Candidates = dict[str, Thunk | Missing]


@dataclass(frozen=True)
class Workload:
    """One row of a report: an op, a shape, its floor, and a function that builds the candidates."""

    op: str
    shape: str
    suite: str
    dtype: str
    flops: float
    bytes: float
    build: Callable[[], Candidates]

    @property
    def name(self) -> str:
        """What `--filter` matches: op, shape and dtype."""
        return f"{self.op} {self.shape} {self.dtype}"


WORKLOADS: list[Workload] = []


def workload(
    op: str, shape: str, *, suite: str = "cpu", dtype: str = "bfloat16", flops: float = 0.0, bytes: float = 0.0
) -> Callable[[Callable[[], Candidates]], Callable[[], Candidates]]:
    """Registers the decorated builder.

    Args:
        op: public name of the op.
        shape: the shape in words, as printed.
        suite: the run it belongs to.
        dtype: of the activations; also picks the matmul peak that the row is compared with.
        flops: floating-point operations of one call, by formula: useful work only.
        bytes: compulsory memory traffic of one call: each input read once, each output written once.
    """

    def register(build: Callable[[], Candidates]) -> Callable[[], Candidates]:
        WORKLOADS.append(Workload(op, shape, suite, dtype, flops, bytes, build))
        return build

    return register


def load(suite: str, pattern: str = "") -> list[Workload]:
    """The workloads of `suite` whose name contains `pattern`, in the order of registration.

    Raises:
        ValueError: nothing matches; the message lists what there is.
    """
    from bench import ops

    for module in sorted(module.name for module in pkgutil.iter_modules(ops.__path__)):
        importlib.import_module(f"bench.ops.{module}")
    chosen = [workload for workload in WORKLOADS if workload.suite == suite and pattern in workload.name]
    if not chosen:
        names = "\n  ".join(f"{workload.suite}: {workload.name}" for workload in WORKLOADS)
        raise ValueError(f"no workload of suite {suite!r} contains {pattern!r}; there are:\n  {names}")
    return chosen
