#!/usr/bin/env bash
# Packs what bench/gpu.sh wants on a GPU machine without a network: bash bench/carry.sh [PYTHON]
#
# PYTHON  an interpreter of that machine's version, with its headers and pip; default: python3.12
#
# kernels/_data.*.so          the data plane for PYTHON, beside _C.so and _C_cuda.so, which serve any Python and torch
# carry/peers.tar.xz          Liger, cut-cross-entropy, cuDNN's frontend
# carry/flash-attn-4.tar.xz   flash-attn 4 and the CUTLASS DSL that it compiles with (68 MB, four minutes of xz)
#
# Take kernels/*.so and carry/ along with the tree. The other machine has a CUDA build of torch, pytest, pytest-xdist,
# pytest-timeout, hypothesis, transformers and peft.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in -h | --help) sed -n '2,12p' "$0" | cut -c3-; exit 0 ;; esac
python=$(command -v "${1:-python3.12}") || { echo "carry.sh: PYTHON: found no ${1:-python3.12}; name one" >&2; exit 2; }
for library in _C _C_cuda; do
  [ -f kernels/$library.so ] || { echo "carry.sh: kernels/$library.so is not built: FORGE_CUDA=on make setup" >&2; exit 2; }
done

PATH=$PWD/.venv/bin:$PATH  # cmake, ninja
cmake -S . -B build/carry -G Ninja -DCMAKE_BUILD_TYPE=Release -DFORGE_CUDA=off -DPython_EXECUTABLE="$python" \
  -Dpybind11_DIR="$(.venv/bin/python -m pybind11 --cmakedir)" >/dev/null
cmake --build build/carry --target _data
cp build/carry/_data.*.so kernels/

mkdir -p carry
# pack NAME PACKAGE...: carry/NAME.tar.xz with these packages alone; what they need and the machine has stays there
pack() {
  local name=$1 site
  site=$(mktemp -d)
  "$python" -m pip --disable-pip-version-check install -q --no-deps --no-compile --only-binary=:all: --target "$site" "${@:2}"
  # Python reads the .pth files of its own site folders alone, unless it is told to.
  echo 'import os, site; site.addsitedir(os.path.dirname(__file__))' >"$site/sitecustomize.py"
  rm -rf "$site"/nvidia_cutlass_dsl/cu*/lib/stubs "$site/bin"
  tar -C "$site" -c . | xz -9 -T0 >"carry/$name.tar.xz.partial"
  mv "carry/$name.tar.xz.partial" "carry/$name.tar.xz"
  rm -rf "$site"
}
pack peers liger-kernel==0.8.5 cut-cross-entropy==25.1.1 nvidia-cudnn-frontend==1.32.0
dsl=4.8.1
pack flash-attn-4 flash-attn-4==4.0.0b36 quack-kernels==0.6.5 nvidia-cutlass-dsl==$dsl nvidia-cutlass-dsl-libs-core==$dsl \
  nvidia-cutlass-dsl-libs-base==$dsl nvidia-cutlass-dsl-libs-cu13==$dsl apache-tvm-ffi==0.1.15.post2 \
  torch-c-dlpack-ext==0.1.5 einops==0.8.2
ls -l kernels/*.so carry/
