"""`run --dry-run`: what a suite would measure here, without measuring it."""

from contextlib import nullcontext

from torch._subclasses.fake_tensor import FakeTensorMode

from bench.registry import Missing, Workload, reason


def listing(workloads: list[Workload]) -> str:
    """Workloads with their candidates, each found or missing with the reason.

    The inputs are fake tensors, which have shapes and no memory: 8192 x 128256 logits cost nothing to list. Whole
    models are loaded as they are.
    """
    lines = []
    for workload in workloads:
        lines.append(f"{workload.name}")
        try:
            with nullcontext() if workload.suite == "e2e" else FakeTensorMode():
                candidates = workload.build()
        except Exception as error:  # listed like everything else
            lines.append(f"  cannot be built: {reason(error)}")
            continue
        for name, candidate in candidates.items():
            why = f"missing: {candidate.reason}" if isinstance(candidate, Missing) else "found"
            lines.append(f"  {name}: {why}")
    return "\n".join(lines)
