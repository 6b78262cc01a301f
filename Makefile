# make demo   sets up and runs the main job: two LoRA arms on real data, with and without the mix -> runs/demo/report.md
# make test   sets up and runs the tests
# make kernels  compiles every Triton kernel for sm_80, sm_90 and sm_100 -> docs/kernels.md
# make bench  measures the CPU suite against every peer, writes bench/results/cpu.json and .md and the README's table
# make gpu    on a machine with a GPU: its tests, its benchmark, a table (bench/gpu.sh --help)
# make check  what CI runs besides the tests: lint, format, the wheel, its types

PYTHON ?= python3
# The CPU build where pip's index has one; any installed torch >= 2.11 works: make TORCH=torch==2.11.0 ...
TORCH ?= torch==2.13.0
# A CUDA build of torch brings its own; a CPU build gets this one, for the interpreter and the compiles without a GPU.
TRITON ?= triton==3.6.0
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)

.PHONY: demo test kernels bench gpu check lint format types setup clean

demo: setup
	$(VENV)/bin/python -m examples.demo

test: setup
	$(VENV)/bin/python -m pytest -q

kernels: setup
	$(VENV)/bin/python -m forge_core.kernels.gpu.aot --output docs/kernels.md

bench: setup
	$(VENV)/bin/python -m bench run --suite cpu --minutes 9 --json bench/results/cpu.json
	$(VENV)/bin/python -m bench readme

gpu:
	bash bench/gpu.sh

check: lint types

setup: $(VENV)/.installed

# Two stamps: the packages change seldom, the compiled sources often.
$(VENV)/.packages: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt "$(TORCH)" numpy setuptools pybind11 cmake ninja
	$(VENV)/bin/python -c "import triton" 2> /dev/null || $(PIP) install "$(TRITON)"
	touch $@

$(VENV)/.installed: $(VENV)/.packages $(SOURCES)
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation -e ".[test,demo,lint]"
	touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The types of the wheel as a user installs it, built in isolation as `pip install .` does.
types: setup
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) wheel --no-deps -w build/wheel .
	$(PIP) install --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel && MYPYPATH=site ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p forge_core
	cd build/wheel && PYTHONPATH=site ../../$(VENV)/bin/python -c "import forge_core.kernels as k; print(k.__file__)"

clean:
	rm -rf $(VENV) build *.egg-info
