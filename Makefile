# make demo   set everything up, then show the package at work: train-free, under a minute
# make test   set everything up, then run all tests
PYTHON ?= python3
PTXEMU ?= ../shared/ptxemu
PTXEMU_BUILD ?= $(CURDIR)/build/ptxemu

# In-tree build for work on kernels: incremental, needs the build requirements in $(PYTHON).
core:
	test -e $(PTXEMU_BUILD)/libcudart.so || sh $(PTXEMU)/build.sh $(PTXEMU_BUILD)
	PATH=$(dir $(PYTHON)):$$PATH cmake -S . -B build/core -G Ninja -DPython_EXECUTABLE=$(PYTHON) \
		-Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir) -DVLMKERNELS_CUDA_ARCHS=90a \
		-DVLMKERNELS_EMULATED_CUDART=$(PTXEMU_BUILD) -DCMAKE_INSTALL_PREFIX=. > build/core.log || (cat build/core.log; false)
	PATH=$(dir $(PYTHON)):$$PATH ninja -C build/core
	cmake --install build/core --prefix . > /dev/null
.PHONY: core
