#!/usr/bin/env bash
# Proof on a GPU in one command: bash bench/gpu.sh [--only tests|sanitizer|bench] [--part 1/3] [--dry-run]
#
# Takes the binaries that lie in kernels/ (built elsewhere against the stable ABI) or builds them, and the peers that
# bench/carry.sh packed; runs the tests marked gpu, several at a time, each worker replaced when a kernel kills, hangs or
# poisons it; compute-sanitizer where there is one on the tests of the CUDA ops; then the gpu suite with every importable
# peer. Leaves JSON and Markdown in bench/results/ and prints a short table last. The status is that of the worst step,
# but every step runs.
#
# --only step  that step alone
# --part i/n   every n-th test file and workload, from the i-th: n calls in a row, or on n machines, do the whole
# --dry-run    measures nothing: lists tests, workloads and peers, each found or missing. Needs no GPU.
# PYTHON       interpreter, default: .venv/bin/python where there is one, else python3
# JOBS         tests at a time, default: 3 of 4 cores
# MINUTES      time of the benchmark, default 5, so that the whole takes less than 10
set -uo pipefail
cd "$(dirname "$0")/.."

part=1/1 dry= only=
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=${2:?--only needs tests, sanitizer or bench}; shift 2 ;;
    --part) part=${2:?--part needs i/n, for example 1/3}; shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) sed -n '2,18p' "$0" | cut -c3-; exit 0 ;;
    *) echo "gpu.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
done
[[ $part =~ ^([1-9][0-9]*)/([1-9][0-9]*)$ ]] && index=${BASH_REMATCH[1]} parts=${BASH_REMATCH[2]} && ((index <= parts)) ||
  { echo "gpu.sh: --part: got $part, expected i/n with 1 <= i <= n, for example 1/3" >&2; exit 2; }
[[ $only =~ ^(|tests|sanitizer|bench)$ ]] ||
  { echo "gpu.sh: --only: got $only, expected tests, sanitizer or bench" >&2; exit 2; }
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
jobs=${JOBS:-$((($(nproc) * 3 + 3) / 4))}
minutes=${MINUTES:-5}
export FORGE_TUNING=${FORGE_TUNING:-all}  # also the kernels that no GPU has run yet: this is where they are tried
status=0 summary=() scratch=$(mktemp -d) link=
trap 'rm -rf "$scratch" $link' EXIT

say() { printf '\n== %s\n' "$*"; }
note() { summary+=("$1"); [ "${2:-0}" = 0 ] || status=1; }
wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }

# --- what was carried here
if compgen -G 'carry/*.tar.xz' >/dev/null; then
  mkdir "$scratch/peers"
  for packed in carry/*.tar.xz; do say "unpacking $packed" && tar -xJf "$packed" -C "$scratch/peers" || exit 1; done
  export PYTHONPATH=$scratch/peers${PYTHONPATH:+:$PYTHONPATH}
fi

# --- binaries
# whether python finds the kernels of this folder, and not those of another installation
finds_ours() {
  "$python" -c 'import os, forge_core.kernels as k
raise SystemExit(not os.path.samefile(os.path.dirname(k.__file__), "kernels"))' 2>/dev/null
}
if ! finds_ours; then
  if compgen -G 'kernels/_C*.so' >/dev/null; then
    say "taking the carried binaries in kernels/"
    link=forge_core/kernels && ln -sfn ../kernels "$link"  # what an editable install does with a finder
  else
    say "building"
    FORGE_CUDA=${FORGE_CUDA:-auto} "$python" -m pip install -q --no-build-isolation --no-deps -e . ||
      { echo "gpu.sh: the build failed, and kernels/ carries no binaries" >&2; exit 1; }
  fi
  finds_ours || { echo "gpu.sh: $python does not find the kernels of this folder; its error:" >&2
    "$python" -c 'import forge_core.kernels as k; print(k.__file__)' >&2; exit 1; }
fi
"$python" - <<'PY' || exit 1
import torch
from forge_core.kernels import available_backends
from forge_core.kernels.library import cuda_library_loaded

gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, torch {torch.__version__}, CUDA ops {'loaded' if cuda_library_loaded() else 'not loaded'}")
print({op: names for op, names in available_backends().items()})
PY

# --- tests
# collected [-k ...]: number of tests and file, one line for each file of this part
collected() {
  "$python" -m pytest -q -m gpu --collect-only tests "$@" 2>/dev/null | sed -n 's/::.*//p' | sort | uniq -c |
    awk -v i="$index" -v n="$parts" 'NR % n == i % n'
}
if [ -n "$dry" ]; then
  say "tests marked gpu (part $part)"
  collected
  say "workloads and peers (part $part)"
  "$python" -m bench run --suite gpu --part "$part" --dry-run
  exit
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "gpu.sh: torch finds no CUDA device; --dry-run lists what would run" >&2; exit 1; }
# Many processes: one thread each, and what they choose by timing while others use the GPU is not to be remembered.
alone=(env "FORGE_TUNING_CACHE=$scratch/tuning.json" OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1)
if wanted tests; then
  mapfile -t files < <(collected | awk '{print $2}')
  say "${#files[@]} files of tests, $jobs at a time"
  # tests/conftest.py ends a poisoned worker.
  "${alone[@]}" "$python" -m pytest -q -m gpu -rfEs -n "$jobs" --dist worksteal \
    --max-worker-restart 1000 --timeout 120 --timeout-method thread "${files[@]}" 2>&1 | tee "$scratch/tests.log"
  failed=${PIPESTATUS[0]}
  note "tests: $(tail -1 "$scratch/tests.log")" "$failed"
  mapfile -t -O ${#summary[@]} summary < <(grep -E '^(FAILED|ERROR|SKIPPED)' "$scratch/tests.log" | cut -c1-160 | head -40)
fi
if wanted sanitizer && ! command -v compute-sanitizer >/dev/null; then
  note "compute-sanitizer: not on this machine"
elif wanted sanitizer; then
  say "compute-sanitizer"
  # The CUDA C++ ops; Triton's kernels test their bounds. What takes more than two minutes is cut off.
  sanitize() {
    timeout 120 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -x -m gpu -k cuda "$1" >"$2" 2>&1
    echo "$? $1" | tee "$2.status"
  }
  export -f sanitize && export python
  "${alone[@]}" xargs -P "$jobs" -I{} bash -c 'sanitize {} "$0/$(basename {}).log"' "$scratch" \
    < <(collected -k cuda | awk '{print $2}')
  for log in "$scratch"/*.log.status; do
    read -r code file <"$log"
    case $code in
      0) note "compute-sanitizer $file: clean" ;;
      124) note "compute-sanitizer $file: nothing found in two minutes, not all run" ;;
      *) note "compute-sanitizer $file: status $code" 1; tail -30 "${log%.status}" ;;
    esac
  done
fi

# --- benchmark
if wanted bench; then
  out=bench/results/gpu-$(date -u +%Y-%m-%d)$([ "$parts" = 1 ] || echo "-part$index")
  say "benchmark, at most $minutes minutes"
  "$python" -m bench run --suite gpu --part "$part" --isolate --minutes "$minutes" --seconds 1.5 --json "$out.json"
  note "benchmark: $out.json" $?
fi

say "result"
printf '%s\n' "${summary[@]}"
[ ! -f "${out:-}.md" ] || cat "$out.md"
exit $status
