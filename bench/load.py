"""How much of the processors other processes used while something was measured (Linux).

Beside another busy process every parallel region waits for the thread that has lost its core, so a measurement on a
shared machine can be off by a factor. The report marks the rows this happened to.
"""

import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
DISTURBED = 0.05  # of a core


class OtherLoad:
    """From its construction to `cores()`: cores that were busy with processes other than this one and its children."""

    def __init__(self) -> None:
        self._begin = _sample()

    def cores(self) -> float | None:
        """None where the system does not say."""
        end = _sample()
        if self._begin is None or end is None:
            return None
        wall, machine, own = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(0.0, (machine - own) / wall)


def _sample() -> tuple[float, float, float] | None:
    """Wall time, processor time of the machine (steal included, idle and waiting for disks not), of our processes."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    machine = (user + nice + system + irq + softirq + steal) / _TICKS
    return time.monotonic(), machine, sum(_processor_seconds(pid) for pid in _with_descendants(os.getpid()))


def _processor_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it has just ended; its parent's children times hold what it used
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS  # user and system, own and of children that ended


def _with_descendants(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in task.read_text().split() for p in _with_descendants(int(child))]
        except FileNotFoundError:  # the thread has ended
            continue
    return found
