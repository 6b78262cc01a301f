"""`--base COMMIT`: the same workloads on the forge_core of another commit, in a second process.

The commit is checked out into a temporary git worktree and built from there. A worker process runs today's workloads
(this bench/) on that build and takes part in the interleaved rounds as one more candidate: it is asked for one call,
times it by itself and answers with the seconds. In between it waits for the next request and uses no processor, so both
builds are measured under the same conditions; a short pause lets the other process's OpenMP threads stop spinning.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.registry import Missing, Remote, Workload

ROOT = Path(__file__).parents[1]
_PAUSE = 0.02  # seconds; libgomp's threads spin for a few milliseconds after a parallel region


class BaseProcess:
    """The worker with another commit's build."""

    def __init__(self, name: str, site: Path, suite: str) -> None:
        self.name = name
        # The build first, then this tree: bench/ is today's, forge_core that of the build. From another folder, because
        # `python -m` would put this tree's forge_core first.
        path = os.pathsep.join([str(site), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.base", suite],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=site,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        loaded = Path(self._ask({"do": "where"})["answer"])
        if site.resolve() not in loaded.resolve().parents:
            raise ValueError(f"--base: the worker loaded forge_core from {loaded}, expected the build in {site}")

    def candidate(self, workload: Workload) -> Remote | Missing:
        """The workload on the other build; Missing with the reason where that build cannot do it."""
        answer = self._ask({"do": "build", "name": workload.name})
        if "error" in answer:
            return Missing(answer["error"])
        return Remote(lambda: self._checked("call"), lambda: self._checked("memory"))

    def close(self) -> None:
        """Ends the worker."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(timeout=30)

    def _checked(self, what: str) -> Any:
        time.sleep(_PAUSE)
        answer = self._ask({"do": what})
        time.sleep(_PAUSE)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"--base: the worker ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def base_process(commit: str, suite: str) -> Iterator[BaseProcess]:
    """Checks out, builds and starts `commit`; cleans up afterwards.

    Args:
        commit: anything git can resolve, or a folder that `pip install --target` has put a build into.
        suite: whose workloads the process is to know.

    Raises:
        ValueError: git does not know the commit, or it does not build; the tools' own words are in the message.
    """
    if (Path(commit) / "forge_core").is_dir():
        site = Path(commit).resolve()
        with contextlib.closing(BaseProcess(f"forge@{site.name}", site, suite)) as process:
            yield process
        return
    name = _run(["git", "-C", str(ROOT), "rev-parse", "--short", f"{commit}^{{commit}}"], "--base").strip()
    with tempfile.TemporaryDirectory(prefix="forge-base-") as folder:
        tree, site = Path(folder) / "tree", Path(folder) / "site"
        _run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), name], "--base")
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            print(f"bench: building {name}", file=sys.stderr, flush=True)
            _run([*pip, "--no-build-isolation", "--no-deps", "--target", str(site), str(tree)], f"building {name}")
            with contextlib.closing(BaseProcess(f"forge@{name}", site, suite)) as process:
                yield process
        finally:
            _run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], "--base")


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{what}: {' '.join(command)} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def serve(suite: str) -> None:
    """The worker: one JSON request a line on standard input, one JSON answer a line on standard output."""
    import torch

    import forge_core.kernels
    from bench import registry, timing
    from bench.measure import try_once
    from bench.registry import suite_device

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not get between the answers
    known: dict[str, Workload] | None = None
    thunk: Any = None

    def build(name: str) -> None:
        nonlocal known, thunk
        thunk = None  # the inputs of the workload before go first
        if known is None:
            known = {workload.name: workload for workload in registry.load(suite, skip_broken=True)}
        torch.manual_seed(0)
        if name not in known:
            raise ValueError(f"not in this build: {name}")
        thunk = known[name].build()["forge"]

    todo: dict[str, Callable[[dict[str, Any]], Any]] = {
        "where": lambda _: forge_core.kernels.__file__,
        "build": lambda request: build(request["name"]),
        "memory": lambda _: try_once(thunk, suite_device(suite))[1],
        "call": lambda _: timing.one_call(thunk),
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": todo[request["do"]](request)}
        except Exception as error:  # an older build may lack what today's workload uses: that is the answer
            answer = {"error": registry.reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
