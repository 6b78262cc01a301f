#!/usr/bin/env bash
# Proof on a GPU in one command: bash bench/gpu.sh [--part 1/3] [--dry-run]
#
# Takes the binaries that lie in kernels/ (built elsewhere against the stable ABI) or builds them; runs the tests marked
# gpu, one process a file, so that a kernel that poisons its process fails alone; compute-sanitizer where there is one on
# the tests of the CUDA ops; then the gpu suite with every importable peer. Leaves JSON and Markdown in bench/results/ and
# prints a short table last. The status is that of the worst step, but every step runs.
#
# --part i/n   every n-th test file and workload, from the i-th: n calls in a row, or on n machines, do the whole
# --dry-run    measures nothing: lists tests, workloads and peers, each found or missing. Needs no GPU.
# PYTHON       interpreter, default: .venv/bin/python where there is one, else python3
# MINUTES      time of the benchmark, default 9
set -uo pipefail
cd "$(dirname "$0")/.."

part=1/1 dry=
while [ $# -gt 0 ]; do
  case $1 in
    --part) part=${2:?--part needs i/n, for example 1/3}; shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) sed -n '2,15p' "$0" | cut -c3-; exit 0 ;;
    *) echo "gpu.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
done
[[ $part =~ ^([1-9][0-9]*)/([1-9][0-9]*)$ ]] && index=${BASH_REMATCH[1]} parts=${BASH_REMATCH[2]} && ((index <= parts)) ||
  { echo "gpu.sh: --part: got $part, expected i/n with 1 <= i <= n, for example 1/3" >&2; exit 2; }
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
minutes=${MINUTES:-9}
export FORGE_TUNING=${FORGE_TUNING:-all}  # also the kernels that no GPU has run yet: this is where they are tried
status=0 summary=()

say() { printf '\n== %s\n' "$*"; }
note() { summary+=("$1"); [ "${2:-0}" = 0 ] || status=1; }

# --- binaries
# whether python finds the kernels of this folder, and not those of another installation
finds_ours() {
  "$python" -c 'import os, forge_core.kernels as k
raise SystemExit(not os.path.samefile(os.path.dirname(k.__file__), "kernels"))' 2>/dev/null
}
link=
trap '[ -z "$link" ] || rm -f "$link"' EXIT
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
mapfile -t files < <(collected | awk '{print $2}')
if [ -n "$dry" ]; then
  say "tests marked gpu (part $part)"
  collected
  say "workloads and peers (part $part)"
  "$python" -m bench run --suite gpu --part "$part" --dry-run
  exit
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "gpu.sh: torch finds no CUDA device; --dry-run lists what would run" >&2; exit 1; }
for file in "${files[@]}"; do
  say "$file"
  timeout 300 "$python" -m pytest -q -m gpu "$file" 2>&1 | tee /tmp/forge-gpu-test.log | tail -15
  failed=${PIPESTATUS[0]}
  note "$file: $(tail -1 /tmp/forge-gpu-test.log)" "$failed"
done
if command -v compute-sanitizer >/dev/null; then
  for file in $(collected -k cuda | awk '{print $2}'); do  # the CUDA C++ ops; Triton's kernels test their bounds
    say "compute-sanitizer $file"
    timeout 120 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -x -m gpu -k cuda "$file" 2>&1 | tail -4
    failed=${PIPESTATUS[0]}
    note "compute-sanitizer $file: status $failed" "$([ "$failed" = 124 ] && echo 0 || echo "$failed")"
  done
else
  note "compute-sanitizer: not on this machine"
fi

# --- benchmark
out=bench/results/gpu-$(date -u +%Y-%m-%d)$([ "$parts" = 1 ] || echo "-part$index")
say "benchmark, at most $minutes minutes"
"$python" -m bench run --suite gpu --part "$part" --isolate --minutes "$minutes" --seconds 1.5 --json "$out.json"
note "benchmark: $out.json" $?

say "result"
printf '%s\n' "${summary[@]}"
[ ! -f "$out.md" ] || cat "$out.md"
exit $status
