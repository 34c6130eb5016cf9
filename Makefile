# Two commands do everything on a fresh clone (Python >= 3.11 and a C++ compiler are enough):
#   make demo                the package at work: a small VLM reads scanned digits (IMAGE=path: your own image)
#   make test                all tests; the CUDA kernels run too, emulated, where an emulator is found
# More: make lint, bench, bench-check, results, train, emulated, isolated, wheel, core, clean.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
# Folder of an emulated CUDA runtime: its build.sh makes a libcudart.so that runs our kernels on the CPU.
PTXEMU ?= ../shared/ptxemu
PTXEMU_BUILD ?= $(CURDIR)/build/ptxemu
EMULATED := $(wildcard $(PTXEMU)/build.sh)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

.PHONY: demo test lint bench bench-check results train emulated isolated wheel core clean format

demo: $(VENV)/installed
	$(BIN)/vlmkernels demo $(if $(IMAGE),--image "$(IMAGE)") $(if $(QUESTION),--question "$(QUESTION)")

# Threads that wait by spinning cost more than they gain as soon as anything else runs.
export OMP_WAIT_POLICY ?= passive

# The second run repeats the parity tests on the oldest tested transformers.
test: export PTXEMU_THREADS ?= 1
test: $(VENV)/installed build/transformers-oldest
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests
	PYTHONPATH=build/transformers-oldest $(BIN)/python -m pytest -n $(JOBS) tests/models tests/patch tests/nn/test_qformer_attention.py

lint: $(VENV)/requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*')

format: $(VENV)/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

bench: $(VENV)/installed
	$(BIN)/vlmkernels bench $(OPS) --json build/bench.json --plot build/bench

# No op may lose more than a fifth of its ratio to eager PyTorch in the committed floor.
bench-check: $(VENV)/installed
	$(BIN)/vlmkernels bench $(OPS) --device cpu --rivals none --check bench/floor.json

# The run of this machine that docs/results.md and README.md show; leave the machine alone meanwhile.
results: $(VENV)/installed
	$(BIN)/python -m bench.publish --run $(OPS) --count

train: $(VENV)/installed
	$(BIN)/vlmkernels train digits

# The editable install, with the core linked a second time to the emulated CUDA runtime.
emulated: $(VENV)/installed
	$(BIN)/python -c "from vlmkernels.testing import has_emulated_core as has; assert has(), 'no emulator in $(PTXEMU)'"

# `pip install .` as an outsider meets it: isolated, no torch, no CUDA toolkit. Prints time and wheel size.
isolated:
	$(PYTHON) tools/isolated_build.py

wheel: $(VENV)/requirements
	$(BIN)/pip wheel --no-deps --no-build-isolation -w dist . \
		-Cbuild-dir=build/wheel -Ccmake.define.VLMKERNELS_EMULATED_CUDART=

# In-tree build for work on kernels: incremental; puts the core beside the Python files.
core: $(if $(EMULATED),$(PTXEMU_BUILD)/libcudart.so)
	mkdir -p build
	PATH="$(dir $(abspath $(PYTHON))):$$PATH" cmake -S . -B build/core -G Ninja -DPython_EXECUTABLE=$(PYTHON) \
		-Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir) -DVLMKERNELS_CUDA_ARCHS=90a \
		$(if $(EMULATED),-DVLMKERNELS_EMULATED_CUDART=$(PTXEMU_BUILD)) > build/core.log || (cat build/core.log; false)
	cmake --build build/core
	cmake --install build/core --prefix . > /dev/null

$(VENV)/requirements: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 is needed: PYTHON=...')"
	@echo "setting up $(VENV): torch and the build tools, a few minutes on a slow line"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/requirements.py test lint > $(VENV)/requirements.in
	$(BIN)/pip install --quiet -c constraints.txt -r $(VENV)/requirements.in
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES) $(if $(EMULATED),$(PTXEMU_BUILD)/libcudart.so)
	@echo "compiling the kernels: some minutes on 2 cores"
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip install --quiet --no-deps --no-build-isolation -e . \
		$(if $(EMULATED),-Ccmake.define.VLMKERNELS_EMULATED_CUDART=$(PTXEMU_BUILD))
	touch $@

$(PTXEMU_BUILD)/libcudart.so:
	sh $(PTXEMU)/build.sh $(PTXEMU_BUILD)

build/transformers-oldest: constraints.txt | $(VENV)/requirements
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ transformers==5.17.0 \
		huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.18
	touch $@

clean:
	rm -rf build dist $(VENV)
