"""What is measured: workloads with their floor in FLOPs and bytes, and the candidates that compete on each.

A module in bench/ops, bench/gpu, bench/e2e or bench/data registers its workloads with the `workload` decorator. The
decorated function builds the inputs once and returns the candidates that share them: `forge` first, then the peers. One
whose name begins with "floor" does only that part of the work that nobody can leave out. A peer that cannot run here is
given as `Missing(reason)` and is listed as such in every report, never dropped; one that raises when tried becomes
`Missing` with the error as its reason.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be measured on this machine, and why."""

    reason: str


class Lazy:
    """A call that is costly to build (a model, a mask, a compiled kernel): built when it is first wanted."""

    def __init__(self, make: Callable[[], Thunk]) -> None:
        self._make = make
        self._call: Thunk | None = None

    def prepare(self) -> Thunk:
        """Builds the call, once."""
        if self._call is None:
            self._call = self._make()
        return self._call

    def __call__(self) -> object:
        return self.prepare()()


@dataclass(frozen=True)
class Slow:
    """A candidate that takes part in a few rounds only, so that a suite ends in time; tried once before them."""

    call: Thunk
    rounds: int = 2


@dataclass(frozen=True)
class Remote:
    """A candidate in another process, which measures itself there.

    Attributes:
        seconds: runs one call and returns the time it took.
        memory: runs one call and returns its peak memory in bytes, None where that is not known.
    """

    seconds: Callable[[], float]
    memory: Callable[[], int | None]


Candidate = Thunk | Slow | Remote | Missing
Candidates = dict[str, Thunk | Slow | Missing]


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
    tokens: int = 0
    note: str = ""
    at_least: Mapping[str, float] = field(default_factory=dict)
    headline: bool = False

    @property
    def name(self) -> str:
        """What `--filter` matches: op, shape and dtype."""
        return f"{self.op} {self.shape} {self.dtype}"


WORKLOADS: list[Workload] = []
SUITES = {"cpu": ("bench.ops",), "gpu": ("bench.ops", "bench.gpu"), "e2e": ("bench.e2e",), "data": ("bench.data",)}


def workload(
    op: str,
    shape: str,
    *,
    suite: str = "cpu",
    dtype: str = "bfloat16",
    flops: float = 0.0,
    bytes: float = 0.0,
    tokens: int = 0,
    note: str = "",
    at_least: Mapping[str, float] | None = None,
    headline: bool = False,
) -> Callable[[Callable[[], Candidates]], Callable[[], Candidates]]:
    """Registers the decorated builder.

    Args:
        op: public name of the op.
        shape: the shape in words, as printed.
        suite: the run it belongs to.
        dtype: of the activations; also picks the matmul peak that the row is compared with.
        flops: floating-point operations of one call, by formula: useful work only. 0 for what is not arithmetic.
        bytes: compulsory memory traffic of one call: each input read once, each output written once.
        tokens: tokens of one call; the report then gives tokens per second.
        note: formula or caveat, printed below the table.
        at_least: peer -> how many times faster than it forge is meant to be; the report shows both.
        headline: whether the README's table shows the row.
    """

    def register(build: Callable[[], Candidates]) -> Callable[[], Candidates]:
        WORKLOADS.append(Workload(op, shape, suite, dtype, flops, bytes, build, tokens, note, at_least or {}, headline))
        return build

    return register


def load(suite: str, pattern: str = "", part: tuple[int, int] = (1, 1), *, skip_broken: bool = False) -> list[Workload]:
    """The workloads of `suite` whose name contains `pattern`: headlines first, then in the order of registration.

    So a limit of time cuts the details, and the parts take equally long.

    Args:
        suite: one of `SUITES`.
        pattern: part of `Workload.name`.
        part: (i, n) takes every n-th of them, beginning with the i-th.
        skip_broken: leave out modules that cannot be imported: those of ops that this build does not have.

    Raises:
        ImportError: a module cannot be imported.
        ValueError: no such suite, or nothing matches; the message lists what there is.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, expected one of {', '.join(SUITES)}")
    for package in map(importlib.import_module, SUITES[suite]):
        for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
            try:
                importlib.import_module(f"{package.__name__}.{module}")
            except ImportError:
                if not skip_broken:
                    raise
    chosen = [workload for workload in WORKLOADS if workload.suite == suite and pattern in workload.name]
    if not chosen:
        names = "\n  ".join(f"{workload.suite}: {workload.name}" for workload in WORKLOADS)
        raise ValueError(f"no workload of suite {suite!r} contains {pattern!r}; there are:\n  {names}")
    index, count = part
    return sorted(chosen, key=lambda workload: not workload.headline)[index - 1 :: count]


def suite_device(suite: str) -> str:
    """Where the workloads of a suite live: the GPU suite on one where there is one."""
    return "cuda" if suite == "gpu" and torch.cuda.is_available() else "cpu"


def peer(module: str, make: Callable[[], Thunk], *, rounds: int = 0) -> "Lazy | Slow | Missing":
    """A candidate that needs a package; Missing where it is not installed.

    Args:
        module: what has to be importable.
        make: builds the call; not run before the candidate is tried.
        rounds: for a `Slow` candidate.
    """
    parts = module.split(".")  # finding a submodule imports its parents: they come first
    if not all(importlib.util.find_spec(".".join(parts[: i + 1])) for i in range(len(parts))):
        return Missing(f"{module} is not installed")
    return Slow(Lazy(make), rounds) if rounds else Lazy(make)


def reason(error: BaseException) -> str:
    """An error in one line of a table."""
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:160]}"
