# Everything a developer runs. `make test` and `make bench` need only python3 with venv, and a C++
# compiler for the fast CPU kernels; they set up $(VENV) at the first call.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= test,bench,dev,triton,cuda,cupy,train,zoo
CXX ?= g++
CXX_NEON ?= aarch64-linux-gnu-g++
CC_NEON ?= aarch64-linux-gnu-gcc
QEMU ?= qemu-aarch64
COMPILERS ?= $(CXX)
JOBS ?= 2
# Of `make engine`: how it is optimized, and its folder in build/.
OPTIMIZE ?= -O3
ENGINE_FOLDER ?= engine

PY := $(VENV)/bin/python
ENV_STAMP := $(VENV)/.bitkernels-environment
BUILD_STAMP := $(VENV)/.bitkernels-build
ENGINE := $(wildcard csrc/*.h $(addprefix csrc/,$(foreach room,torch cpu network,$(room)/*.cpp $(room)/*.h $(room)/*.inc)))
# The size of code that plans networks, and of kernels for old processors, matters more than its speed.
LIBRARY_SOURCES := $(wildcard csrc/cpu/*.cpp csrc/network/*.cpp)
KERNEL_TEST := $(wildcard csrc/cpu/*.cpp csrc/tests/*.cpp)
NAIVE := $(wildcard csrc/tests/*.cpp)
NETWORK_TEST := $(LIBRARY_SOURCES) $(wildcard csrc/tests/network/*.cpp)
CXX_FORMATTED = $(shell find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
PY_FORMATTED = $(wildcard setup.py bitkernels bitkernels_tests benchmarks examples)
# GCC 12 takes its own AVX-512 headers for uninitialized reads.
WARN := -Wall -Wextra -Wno-maybe-uninitialized -Wno-unknown-warning-option
KERNEL_FLAGS := -std=c++17 -ffp-contract=off -fno-math-errno -pthread -Icsrc $(WARN)
# Reports name lines; what -g has more, of variables, is a third of what compiling costs.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
RACES := -fsanitize=thread

# Tests of what does not depend on the CPU kernel in use; test-all leaves them to `make test`.
OTHER_TESTS := $(addprefix bitkernels_tests/,backends benchmarks cli converter docs install metrics models \
  network/test_library.py network/test_zoo.py nn optim toolchains tools train ops/test_records.py test_explain.py test_interop.py \
  test_packed_tensor.py test_quantizers.py test_thresholds.py test_traces.py)
# What torch asks of operators whatever kernel computes; the reference is asked as well.
OTHER_CHECKS := $(addprefix --deselect=bitkernels_tests/ops/test_contract.py::test_,opcheck compiled one_compile export raw)

# $(call kernel_test,compiler,flags,folder,sanitizers): the tests of csrc/cpu and of csrc/network in
# build/folder. The loops that the kernels are compared with run without sanitizers, which made three
# quarters of their time; what they allocate is still as long as it is, to the instrumented kernels.
objects = $(patsubst %.cpp,build/$(1)/%.o,$(notdir $(2)))
define kernel_test
	mkdir -p build/$(3)
	printf '%s\n' $(foreach f,$(sort $(KERNEL_TEST) $(NETWORK_TEST)),'$(if $(filter $(NAIVE),$(f)),,$(4)) -c $(f)') | \
	xargs -P $(JOBS) -I{} sh -c 'set -- {}; for f; do :; done; \
	  $(1) {} $(2) $(KERNEL_FLAGS) -o build/$(3)/$$(basename $$f .cpp).o'
	$(1) $(2) $(4) $(KERNEL_FLAGS) $(call objects,$(3),$(KERNEL_TEST)) -o build/$(3)/kernel_test
	$(1) $(2) $(4) $(KERNEL_FLAGS) $(call objects,$(3),$(NETWORK_TEST)) -o build/$(3)/network_test
endef

# $(call run_tests,runner,programs with arguments): side by side, in this order.
run_tests = printf '%s\n' $(2) | xargs -P $(JOBS) -I{} sh -c '$(1) build/{}'
# $(call tests_of,folder): of all kernels, of which scalar takes half the time.
tests_of = '$(1)/kernel_test others' '$(1)/kernel_test scalar' '$(1)/network_test'
# The same, of one random case in four.
some_of = '$(1)/kernel_test others 4' '$(1)/kernel_test scalar 4' '$(1)/network_test'

# $(call engine,compiler,C compiler,flags,folder,archiver): the library for whole networks without
# Python and LibTorch, and what is linked with it.
define engine
	mkdir -p build/$(4)
	printf '%s\n' $(foreach f,$(LIBRARY_SOURCES),'$(if $(or $(findstring network,$(f)),$(findstring scalar,$(f))),$(3:-O3=-Os),$(3)) -c $(f)') | \
	xargs -P $(JOBS) -I{} sh -c 'set -- {}; for f; do :; done; \
	  $(1) {} $(KERNEL_FLAGS) -DBK_INFERENCE_ONLY -ffunction-sections -fdata-sections -o build/$(4)/$$(basename $$f .cpp).o'
	rm -f build/$(4)/libbitkernels.a
	$(5) rcs build/$(4)/libbitkernels.a $(call objects,$(4),$(LIBRARY_SOURCES))
endef

# $(call classify,compiler,C compiler,folder): the example, one file that needs nothing.
define classify
	$(2) -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Icsrc -c examples/cpp/classify.c -o build/$(3)/classify.o
	$(1) -static -s -Wl,--gc-sections build/$(3)/classify.o build/$(3)/libbitkernels.a -pthread -o build/$(3)/classify
endef

.PHONY: help test bench build test-all kernel-test kernel-test-plain kernel-test-sanitized \
  kernel-test-races kernel-test-compilers kernel-test-neon engine engine-neon mutants gpu-check abi-audit lint clean

help:
	@echo "make test              build and run the tests"
	@echo "make bench             build and measure binary against real convolutions"
	@echo "make build             set up $(VENV) and build into it"
	@echo "make test-all          the tests once for each other CPU kernel of this machine"
	@echo "make kernel-test       the C++ engine alone, plain, under sanitizers and with threads"
	@echo "make kernel-test-compilers  the same, quickly, by each of COMPILERS"
	@echo "make kernel-test-neon  the same for aarch64, under qemu"
	@echo "make engine            build/engine: networks without Python and LibTorch, and an example"
	@echo "make engine-neon       the same for aarch64"
	@echo "make mutants           do the tests notice each mistake of a list?"
	@echo "make gpu-check         on a GPU machine: all kernels checked, timed and tested, 7 minutes"
	@echo "make abi-audit         the built extension keeps to the stable ABIs"
	@echo "make lint              ruff, mypy, clang-format"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)' EXTRAS=$(EXTRAS)"

# One thread a process; the tests that are about threads set their number.
test: build
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

bench: build
	$(PY) benchmarks/bench_conv.py

build: $(BUILD_STAMP)

$(ENV_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel ninja
	$(PY) -m pip install --quiet "$(TORCH)"
	touch $@

$(BUILD_STAMP): $(ENV_STAMP) setup.py pyproject.toml $(ENGINE)
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

# Single-threaded runs side by side, the longest first; the first kernel, the best, is the one that
# `make test` runs.
test-all: build
	mkdir -p build
	@kernels=$$($(PY) -m bitkernels --cpu-kernels) && printf '%s\n' $$kernels | sed 1s/.*/reference/ | \
	xargs -P $(JOBS) -I{} sh -c '$(MAKE) -s test-with-{} > build/test-{}.log 2>&1; code=$$?; \
	  echo "== BITKERNELS_CPU={}"; [ $$code = 0 ] || cat build/test-{}.log; \
	  tail -n 1 build/test-{}.log; exit $$code'

test-with-%: build
	BITKERNELS_CPU=$* OMP_NUM_THREADS=1 $(PY) -m pytest -q $(OTHER_TESTS:%=--ignore=%) \
	  $(if $(filter-out reference,$*),$(OTHER_CHECKS))

kernel-test: kernel-test-sanitized kernel-test-races kernel-test-plain

kernel-test-plain:
	$(call kernel_test,$(CXX),-O3,plain)
	$(call run_tests,,$(call tests_of,plain))

kernel-test-sanitized:
	$(call kernel_test,$(CXX),-O1 -g1,sanitized,$(SANITIZE))
	$(call run_tests,,$(call tests_of,sanitized))

kernel-test-races:
	$(call kernel_test,$(CXX),-O1 -g1 -DREAL_THREADS,races,$(RACES))
	$(call run_tests,,'races/kernel_test scalar' 'races/network_test threads')

# Whether other compilers take the engine, at what costs least time.
kernel-test-compilers: $(addprefix kernel-test-by-,$(COMPILERS))

kernel-test-by-%:
	$(call kernel_test,$*,-O1,$*)
	$(call run_tests,,$(call some_of,$*))

mutants: build
	$(PY) -m bitkernels_tests.mutants --jobs $(JOBS)

kernel-test-neon:
	$(call kernel_test,$(CXX_NEON),-static -O3,neon)
	$(call run_tests,$(QEMU),'neon/kernel_test others' 'neon/kernel_test scalar 4' 'neon/network_test')

engine:
	$(call engine,$(CXX),$(CC),$(OPTIMIZE),$(ENGINE_FOLDER),$(AR))
	$(call classify,$(CXX),$(CC),$(ENGINE_FOLDER))

engine-neon:
	$(call engine,$(CXX_NEON),$(CC_NEON),-O3,engine-neon,$(AR))
	$(call classify,$(CXX_NEON),$(CC_NEON),engine-neon)

# Where $(PYTHON) has torch, as on a GPU machine without a network, it and this tree are used as they
# are. GPU_CHECK: its options, as --parts compile,correct,conv or --minutes 3.
gpu-check:
	@if $(PYTHON) -c "import torch" 2> /dev/null; then $(PYTHON) benchmarks/gpu/check.py $(GPU_CHECK); \
	else $(MAKE) build && $(PY) benchmarks/gpu/check.py $(GPU_CHECK); fi

abi-audit: build
	$(VENV)/bin/torch-abi-audit --check both bitkernels/_C.abi3.so
	$(VENV)/bin/abi3audit --strict --assume-minimum-abi3 3.10 bitkernels/_C.abi3.so

lint: build
	$(VENV)/bin/ruff check $(PY_FORMATTED)
	$(VENV)/bin/mypy
	$(if $(CXX_FORMATTED),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FORMATTED))

clean:
	rm -rf build dist *.egg-info bitkernels/*.so
