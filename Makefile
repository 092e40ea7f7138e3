# make demo, make test, make lint, make bench, make simt, make sanitize: each makes what it needs in
# .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Also holds in pip's isolated builds. Where torch comes from, and so whether it is the CPU or the
# CUDA build, is for pip's own configuration to say (see CONTRIBUTING.md).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := $(BIN)/python -m pip install --quiet

CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
SOURCES := $(CXX_FILES) $(wildcard tools/*) CMakeLists.txt setup.py pyproject.toml

# The CUDA kernels are built wherever nvcc is; but for a demo, which must not take long, only where
# there is a GPU to run them.
BUILT := $(VENV)/built
ifeq ($(or $(MAKECMDGOALS),demo),demo)
ifneq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo GPU),GPU)
BUILT := $(VENV)/built-without-cuda
endif
endif

.PHONY: demo test lint bench simt sanitize test-torch clean

demo: $(VENV)/with-demo $(BUILT)
	$(BIN)/python -m mor_ext.demo $(if $(TEXT),--text $(TEXT)) $(if $(OUT),--out $(OUT))

test: $(VENV)/with-test $(VENV)/built simt
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The CUDA kernels as a library that runs them on the host; the last line is its path.
simt: $(VENV)/torch
	@$(call build_simt,build/simt,)
	@echo $(CURDIR)/build/simt/libmor_simt.so

# The tests on that library, built with AddressSanitizer and UndefinedBehaviorSanitizer. What they
# find ends the process at once: --capture=sys lets their report through, -v says in which test.
sanitize: $(VENV)/with-test $(VENV)/built
	@$(call build_simt,build/simt-sanitize,-DMOR_SANITIZE=ON)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -m pytest -v -k simt \
		--capture=sys --simt-library=build/simt-sanitize/libmor_simt.so $(PYTEST_ARGS)

lint: $(VENV)/with-lint $(VENV)/with-test  # mypy reads the types of what is used
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

bench: $(VENV)/with-test $(VENV)/with-demo $(VENV)/built
	mkdir -p bench/out
	$(BIN)/python -m pytest bench --quiet --benchmark-only --benchmark-json=bench/out/bench.json
	$(BIN)/python bench/bench_models.py --json bench/out/models.json >/dev/null
	$(BIN)/python bench/bench_engine.py $(if $(TRAINED),--trained $(TRAINED) --text $(TEXT)) \
		--json bench/out/engine.json >/dev/null
	$(BIN)/python bench/report.py bench/out/bench.json

# The wheel built against the torch of .venv, tested with another one: make test-torch TORCH=2.10.0
test-torch: $(VENV)/built
	$(if $(TORCH),,$(error say which torch, as in make test-torch TORCH=2.10.0))
	rm -rf build/torch-$(TORCH)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/torch-$(TORCH) .
	$(BIN)/python -m venv build/torch-$(TORCH)/venv
	PIP_CONSTRAINT= build/torch-$(TORCH)/venv/bin/pip install --quiet torch==$(TORCH) \
		"$$(ls build/torch-$(TORCH)/*.whl)[test]"
	cd build/torch-$(TORCH) && venv/bin/pytest -c ../../pyproject.toml ../../python_tests \
		--ignore ../../python_tests/test_packaging.py $(PYTEST_ARGS)
	rm -rf build/torch-$(TORCH)

clean:
	rm -rf $(VENV) build dist bench/out *.egg-info mor_ext/*.so

# $(call build_simt,folder,cmake options)
define build_simt
$(BIN)/cmake -S csrc/simt -B $(1) -G Ninja $(2) -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	$$($(BIN)/python -c 'import torch; from pathlib import Path; root = Path(torch.__file__).parent; \
	print(f"-DMOR_TORCH_INCLUDE={root}/include -DMOR_TORCH_LIBRARY={root}/lib/libtorch_cpu.so")') >&2
$(BIN)/cmake --build $(1) $(if $(MAX_JOBS),-j $(MAX_JOBS)) >&2
endef

# $(call build,environment)
define build
@echo "Building mor_ext"
$(1) $(PIP_INSTALL) --no-build-isolation --editable .
@cat build/cmake-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')/kernels.txt
endef

# ---- the environment; each file stands for a finished step ----

$(VENV)/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the build tools in $(VENV)"
	$(PIP_INSTALL) torch setuptools pybind11 cmake ninja
	touch $@

# Who has the kernels for CUDA needs no build without them.
$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(call build,)
	touch $@ $(VENV)/built-without-cuda

$(VENV)/built-without-cuda: $(VENV)/torch $(SOURCES)
	rm -f $(VENV)/built
	$(call build,MOR_CUDA_ARCHS=none)
	touch $@

# with-<extra>: the packages of an extra of pyproject.toml, for what is installed.
$(VENV)/with-%: $(VENV)/torch pyproject.toml | $(BUILT)
	$(PIP_INSTALL) 'mor_ext[$*]'
	touch $@
