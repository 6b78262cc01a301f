"""python -m bench run | compare | profile | readme; each explains itself with --help."""

import argparse
import math
import sys
from pathlib import Path

import torch

from bench import registry, report
from bench.run import NOT_MEASURED, run


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of forge_core against its peers")
    commands = parser.add_subparsers(dest="command", required=True)

    runner = commands.add_parser("run", help="measure a suite")
    runner.add_argument("--suite", default="cpu", help=f"{', '.join(registry.SUITES)} (default: cpu)")
    runner.add_argument("--filter", default="", help="only workloads whose name contains this text")
    runner.add_argument("--peers", default="", help="only peers whose name contains this text")
    runner.add_argument("--part", type=_part, default=(1, 1), help="1/3: the first third of the workloads")
    runner.add_argument("--seconds", type=float, default=2.0, help="time spent on each workload (default: 2)")
    runner.add_argument("--base", metavar="COMMIT", help="measure that commit, or the build in that folder, too")
    runner.add_argument("--isolate", action="store_true", help="in a child process; survives a crash of a workload")
    runner.add_argument("--minutes", type=float, default=math.inf, help="begin no workload after so many minutes")
    runner.add_argument("--json", type=Path, help="write the result here, and as Markdown beside it")
    runner.add_argument("--threads", type=int, help="threads of torch's pool (default: torch's own choice)")
    runner.add_argument("--dry-run", action="store_true", help="list workloads and peers, measure nothing")

    profiler = commands.add_parser("profile", help="where the time of one op goes")
    profiler.add_argument("op", help="name of the op")
    profiler.add_argument("--shape", default="", help="part of the shape; the first workload that fits is taken")
    profiler.add_argument("--suite", default="cpu", help="default: cpu")
    profiler.add_argument("--candidate", default="forge", help="default: forge")
    profiler.add_argument("--calls", type=int, default=5, help="calls under the profiler (default: 5)")
    profiler.add_argument("--top", type=int, default=20, help="rows of the table (default: 20)")
    profiler.add_argument("--threads", type=int, help="threads of torch's pool (default: torch's own choice)")

    comparer = commands.add_parser("compare", help="two results side by side")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)

    shower = commands.add_parser("readme", help="rewrite the README's table from results")
    shower.add_argument("results", type=Path, nargs="*", help="default: bench/results/<suite>.json, those that exist")
    arguments = parser.parse_args()
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    try:
        return {"run": _run, "profile": _profile, "compare": _compare, "readme": _readme}[arguments.command](arguments)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected i/n with 1 <= i <= n, for example 1/3")
    return int(index), int(count)


def _run(arguments: argparse.Namespace) -> int:
    workloads = registry.load(arguments.suite, arguments.filter, arguments.part)
    if arguments.dry_run:
        from bench.dry import listing

        print(listing(workloads))
        return 0
    options = {
        "seconds": arguments.seconds, "peers": arguments.peers, "minutes": arguments.minutes,
        "say": lambda text: print(text, flush=True),
    }  # fmt: skip
    if arguments.base and arguments.isolate:
        raise ValueError("--base and --isolate: got both, expected one of them")
    if arguments.base:
        from bench.base import base_process

        with base_process(arguments.base, arguments.suite) as base:
            result = run(arguments.suite, workloads, base=base.candidate, base_name=base.name, **options)
    else:
        result = run(arguments.suite, workloads, isolate=arguments.isolate, **options)
    if arguments.json:
        report.write(result, arguments.json)
    else:
        print("\n" + report.markdown(result))
    reasons = [row["failed"] for row in result["rows"] if "failed" in row]
    return 1 if any(not reason.startswith(NOT_MEASURED) for reason in reasons) else 0


def _profile(arguments: argparse.Namespace) -> int:
    from bench.profile import profile

    print(profile(arguments.op, arguments.shape, arguments.suite, arguments.candidate, arguments.calls, arguments.top))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    print(report.compare(arguments.before, arguments.after))
    return 0


def _readme(arguments: argparse.Namespace) -> int:
    from bench.readme import rewrite_file

    folder = Path(__file__).parent / "results"
    of_record = [path for suite in registry.SUITES if (path := folder / f"{suite}.json").is_file()]
    rewrite_file(Path(__file__).parents[1] / "README.md", arguments.results or of_record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
