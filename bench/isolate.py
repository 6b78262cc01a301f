"""`run --isolate`: workloads are measured in a child process, which is replaced when one of them kills or hangs it.

An illegal access on a GPU poisons the CUDA context of its process for good. The row of the workload that did it says
so, and the next one begins in a new process.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import registry, report
from bench.measure import measure
from bench.registry import Workload, suite_device
from bench.timing import Roofline

ROOT = Path(__file__).parents[1]
LIMIT = 240.0  # seconds for one workload, compiling and autotuning included


class Isolated:
    """Measures workloads in a child process; `measure` fits in for `bench.measure.measure`."""

    def __init__(self, suite: str, seconds: float, peers: str, limit: float = LIMIT) -> None:
        self._arguments = [suite, str(seconds), peers]
        self._limit = limit
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def measure(self, workload: Workload, roofline: Roofline) -> dict[str, Any]:
        """The row of this workload, a failed one where the child did not give it."""
        child = self._living_child()
        assert child.stdin
        try:
            child.stdin.write(json.dumps({"name": workload.name, "roofline": asdict(roofline)}) + "\n")
            child.stdin.flush()
            answer = self._answers.get(timeout=self._limit)
        except queue.Empty:
            self.close()
            return report.failed_row(workload, f"took more than {self._limit:.0f} s; its process was ended")
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = child.wait()
            self.close()
            return report.failed_row(workload, f"its process ended with status {status}")
        row: dict[str, Any] = json.loads(answer)
        return row

    def close(self) -> None:
        """Ends the child."""
        if self._child:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _living_child(self) -> "subprocess.Popen[str]":
        if self._child and self._child.poll() is None:
            return self._child
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bench.isolate", *self._arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._child, self._answers), daemon=True).start()
        return self._child


def _read(child: "subprocess.Popen[str]", answers: "queue.Queue[str]") -> None:
    assert child.stdout
    for line in child.stdout:
        answers.put(line)
    answers.put("")  # the child is gone


def serve(suite: str, seconds: float, peers: str) -> None:
    """The child: one workload a line on standard input, its row as a line on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not get between the rows
    known = {workload.name: workload for workload in registry.load(suite)}
    device = suite_device(suite)
    for line in sys.stdin:
        request = json.loads(line)
        row = measure(known[request["name"]], Roofline(**request["roofline"]), device, seconds, peers)
        poisoned = False
        if device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # the row already tells which candidate failed
                poisoned = True
        print(json.dumps(row), file=answers, flush=True)
        if poisoned:
            os._exit(3)  # no destructor can run on a broken context


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]), sys.argv[3])
