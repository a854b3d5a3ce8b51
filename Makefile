# Every target sets itself up: a virtual environment in .venv, torch first, then the package and its extras.
PYTHON ?= python3
VENV ?= .venv
# Pinned, and installed alone and first: nothing that follows replaces it.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIBRARY := diffpp_fast/native/_library.so

# Busy-waiting threads cost more than they gain when cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed without its compiled operators: what needs one builds it when it is first used.
export DS_BUILD_OPS ?= 0

.PHONY: help setup demo demo-short demo-frontier demo-judges test test-all test-oldest test-matrix sanitize emulate lint types bench gpu-build gpu-check wheels wheels-check hub-kernels full-size docs clean

help:
	@echo "make demo       align the emoji generator with a reward: about 3 minutes on two cores, pictures in runs/demo"
	@echo "make test       linter, type checker, tests (no GPU needed)"
	@echo "make test-all   the same with the slow tests"
	@echo "make test-oldest  the operators, builds and the rehearsal with the oldest torch, Triton and Python (fetches 2.6 GB)"
	@echo "make test-matrix  a wheel for each Python from 3.10 to 3.13 that is here, its operators tested with torch 2.11 and 2.13 (5 GB for each)"
	@echo "make demo-short the demo cut to a minute: shows that it works, not what it can do"
	@echo "make demo-frontier  the reward over the divergence from the reference, and DIDR beside it, in runs/frontier"
	@echo "make sanitize   the tests of the compiled operators under AddressSanitizer and UBSan"
	@echo "make emulate    the tests of the operators on csrc's GPU kernels, thread by thread on the CPU (needs CUDA's headers)"
	@echo "make bench      every operator measured against plain torch; BENCH='reward' or any other arguments of python -m benchmarks"
	@echo "make gpu-build  every GPU kernel compiled for sm_80, sm_90 and sm_100: spills, registers, instructions, bytes (no GPU needed)"
	@echo "make gpu-check  with a GPU, in 8 minutes: everything checked on it, kernels measured; REHEARSE=1 without one"
	@echo "make wheels     in dist/: for Python from 3.10 and glibc from 2.28, without GPU kernels and, with nvcc, with them"
	@echo "make wheels-check  those wheels where only torch is, in each Python from 3.10 to 3.13 that is here (fetches gigabytes)"
	@echo "make hub-kernels  the operators as a package for Hugging Face's kernels, in build/hub-kernels"
	@echo "make full-size  SD1.5, PixArt and SDXL at random weights, two steps and an export each: memory against plan (up to 20 GiB, 30 GB of disk)"
	@echo "make docs       the documentation as a site in site/"
	@echo "make setup      only the virtual environment and the compiled operators; every target begins with it"

setup: $(LIBRARY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	DIFFPP_FAST_BUILD=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $(READY)

# In place, next to the Python files that load it. Always asked: what it is made of (sources, torch, compilers, flags) is
# compared in csrc/compilation.py, which does nothing where nothing has changed.
$(LIBRARY): $(READY) FORCE
	$(BIN)/python setup.py --quiet build_ext --inplace
FORCE:

demo: $(LIBRARY)
	$(BIN)/python examples/emoji/demo.py --out runs/demo

demo-short: $(LIBRARY)
	$(BIN)/python examples/emoji/demo.py --out runs/demo-short --short

demo-frontier: $(LIBRARY)
	$(BIN)/python examples/emoji/frontier.py --out runs/frontier

# The preference judges anew; data.py needs the font.
demo-judges: $(LIBRARY)
	$(BIN)/python examples/emoji/data.py --out build/emoji
	$(BIN)/python examples/emoji/train_judges.py --data build/emoji

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# A process per core; the tests of a file stay in one, for they share what is expensive to set up.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadfile
test: $(LIBRARY) lint types
	$(BIN)/pytest $(WORKERS) -m "not slow"

test-all: $(LIBRARY) lint types
	$(BIN)/pytest $(WORKERS)
	if command -v nvcc > /dev/null; then $(MAKE) emulate; else echo "no nvcc: csrc's GPU kernels are not emulated"; fi

# The other end of what is supported, in environments and a copy of the tree of its own. The copy begins without a built library
# but with the objects of last time. First what a machine with a GPU and no more than torch does, then csrc for GPUs, the tests, Triton's
# kernels ahead of time, a wheel where pip isolates nothing, and the package installed by the oldest Python.
OLDEST := build/oldest
OLDEST_BIN := $(abspath $(VENV)-oldest/bin)
OLDEST_310 := $(abspath $(VENV)-oldest-3.10/bin)
PYTHON_3_12 ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python)),python3.12)
PYTHON_3_10 ?= $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python)),python3.10)
OLDEST_TESTS := test_noise.py test_dispatch.py test_native_*.py test_ops_*.py test_triton_*.py test_gpu_*.py
OLDEST_RUN := cd $(OLDEST) && env -u TRITON_INTERPRET PYTHONPATH="$(abspath $(OLDEST))"
test-oldest:
	test -x "$(OLDEST_BIN)/python" || "$(PYTHON_3_12)" -m venv $(VENV)-oldest
	test -x "$(OLDEST_310)/python" || "$(PYTHON_3_10)" -m venv $(VENV)-oldest-3.10
	for bin in "$(OLDEST_BIN)" "$(OLDEST_310)"; do "$$bin/python" -m pip install --quiet --no-deps --requirement tests/oldest.txt || exit 1; done
	mkdir -p $(OLDEST) && find $(OLDEST) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory=$(OLDEST)
	cd $(OLDEST) && env -u PYTHONPATH $(MAKE) gpu-check REHEARSE=1 PYTHON="$(OLDEST_BIN)/python"
	$(OLDEST_RUN) "$(OLDEST_BIN)/python" setup.py --quiet build_ext --inplace
	$(OLDEST_RUN) "$(OLDEST_BIN)/python" -m pytest $(WORKERS) -m "not slow" $(addprefix tests/,$(OLDEST_TESTS))
	$(OLDEST_RUN) "$(OLDEST_BIN)/python" -m benchmarks.gpu_build --no-count $(if $(shell command -v nvcc),,--no-csrc)
	env -u PYTHONPATH "$(OLDEST_BIN)/python" -m pytest tests/test_packaging.py tests/test_build.py
	DIFFPP_FAST_CUDA=0 "$(OLDEST_310)/python" -m pip install --quiet --no-deps --no-build-isolation --force-reinstall ./$(OLDEST)
	cd $(OLDEST)/tests && env -u PYTHONPATH "$(OLDEST_310)/python" installed.py && "$(OLDEST_310)/diffpp-fast" --help > /dev/null

# One wheel for each Python that is here, built with the oldest torch: its library serves every torch by the stable ABI, so the same
# wheel is tested with each. The tests run on a copy without the package, so that they can't import the tree's. One cell of the
# matrix: MATRIX_PYTHONS=3.12 MATRIX_TORCHES=2.13.0; where a CPU build of torch lies: MATRIX_PIP="--extra-index-url URL".
MATRIX_PYTHONS ?= 3.10 3.11 3.12 3.13
MATRIX_TORCHES ?= 2.11.0 2.13.0
MATRIX_PIP ?=
MATRIX_VENVS ?= $(VENV)-matrix
MATRIX_PACKAGES := numpy pytest pytest-xdist hypothesis safetensors pillow "setuptools>=70.1" "pybind11>=2.13"
MATRIX_TESTS := tests/test_noise.py tests/test_dispatch.py $(wildcard tests/test_ops_*.py)
test-matrix: $(addprefix matrix-,$(MATRIX_PYTHONS))
matrix-%: python = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$*.*/bin/python)),$(shell command -v python$*))
matrix-%: bin = $(abspath $(MATRIX_VENVS)/$*/bin)
matrix-%: folder = build/matrix/$*
matrix-%: FORCE
	if test -z "$(python)"; then echo "no Python $*: left out"; exit 0; fi; set -e; \
	test -x "$(bin)/python" || "$(python)" -m venv "$(MATRIX_VENVS)/$*"; \
	rm -rf $(folder) && mkdir -p $(folder) && cp -R tests benchmarks examples docs pyproject.toml $(folder); \
	for torch in $(MATRIX_TORCHES); do \
	  "$(bin)/python" -m pip install --quiet $(MATRIX_PIP) torch==$$torch $(MATRIX_PACKAGES); \
	  test -d $(folder)/wheel || DIFFPP_FAST_CUDA=0 "$(bin)/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(folder)/wheel .; \
	  "$(bin)/python" -m pip install --quiet --no-deps --force-reinstall $(folder)/wheel/*.whl; \
	  echo "Python $*, torch $$torch:"; \
	  (cd $(folder) && PYTHONPATH=. "$(bin)/python" tests/installed.py && \
	    PYTHONPATH=. "$(bin)/python" -m pytest $(WORKERS) -m "not slow" -p no:cacheprovider $(MATRIX_TESTS)); \
	done

# A copy of the package with an instrumented library; leaks are Python's own at exit.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined
# torch.compile runs a compiler of its own; instrumented sums are not vectorised and round a little worse than shipped ones.
SANITIZE := not compiles and not low_precision and not as_close_to_float64
sanitize: $(READY)
	CXXFLAGS="$(SANITIZERS) -fno-sanitize-recover=all -fno-omit-frame-pointer -g" LDFLAGS="$(SANITIZERS)" \
	  $(BIN)/python setup.py --quiet build --build-base $(SANITIZED)/base --build-lib $(SANITIZED)/lib
	for isa in baseline avx512; do \
	  (cd tests && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=../$(SANITIZED)/lib PYTHONSAFEPATH=1 DIFFPP_FAST_ISA=$$isa \
	  "$(abspath $(BIN))/pytest" -m "not slow" -k "$(SANITIZE)" -p no:cacheprovider test_noise.py test_native_*.py test_ops_*.py) || exit 1; \
	done

# A copy of the package whose backend "cpu" runs csrc's GPU kernels, a fiber for each thread (tests/emulation/emulation.h). Left out:
# statistics that the CPU's kernels round less, and their exponential of numbers below -87.
# The emulated GPU has clusters of blocks; where a kernel is for them, the one for GPUs without them is tested as well.
EMULATED := build/emulated
EMULATE := PYTHONPATH=../$(EMULATED) PYTHONSAFEPATH=1 "$(abspath $(BIN))/pytest" -p no:cacheprovider \
  -m "not slow" -k "not compiles and not reference and not far_apart and not every_magnitude"
emulate: $(READY)
	$(BIN)/python tests/emulation/build.py $(EMULATED)
	cd tests && PYTHONPATH=../$(EMULATED):.. PYTHONSAFEPATH=1 "$(abspath $(BIN))/python" emulation/launches.py ../$(EMULATED)
	cd tests && $(EMULATE) $(foreach op,add_noise denoising_loss score_gap reward_pixels group_norm_silu,test_native_$(op).py test_ops_$(op).py) test_noise.py
	cd tests && DIFFPP_EMULATED_ARCH=80 $(EMULATE) test_native_group_norm_silu.py test_ops_group_norm_silu.py

# Any arguments of `python -m benchmarks`.
BENCH ?= kernels
bench: $(LIBRARY)
	$(BIN)/python -m benchmarks $(BENCH)

# BUDGET=write records what the kernels take now.
BUDGET ?= check
gpu-build: $(LIBRARY)
	env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.gpu_build --budget $(BUDGET)

# A machine with a GPU may have no network: where PYTHON has what it takes, that is used as it is. Options: GPU_CHECK.
GPU_READY := import torch, triton, sys; sys.exit(not (torch.cuda.is_available() or "$(REHEARSE)"))
GPU_RUN := -m benchmarks.gpu_check $(if $(REHEARSE),--rehearse) $(GPU_CHECK)
gpu-check:
	if "$(PYTHON)" -c '$(GPU_READY)' 2> /dev/null; then PYTHONPATH=".:$$PYTHONPATH" "$(PYTHON)" $(GPU_RUN); \
	else $(MAKE) setup && $(BIN)/python $(GPU_RUN); fi

# Options: WHEELS_CHECK, those of csrc/wheels_check.py.
wheels-check: wheels
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python csrc/wheels_check.py $(WHEELS_CHECK)

wheels: $(READY)
	$(BIN)/python csrc/wheels.py cpu
	if command -v nvcc > /dev/null; then $(BIN)/python csrc/wheels.py cuda; else echo "no nvcc: no wheel with GPU kernels"; fi

# HUB: any arguments of csrc/hub/make.py.
hub-kernels: $(READY)
	$(BIN)/python csrc/hub/make.py $(HUB)

MATHJAX := docs/javascripts/mathjax
# One model: FULL_SIZE=sd15. It is no part of the tests.
full-size: $(LIBRARY)
	$(BIN)/python -m benchmarks.full_size $(FULL_SIZE)

docs: $(READY) $(MATHJAX)/tex-chtml.js
	$(BIN)/mkdocs build --strict

# Formulas are typeset in the browser, by files that lie with the site.
$(MATHJAX)/tex-chtml.js:
	command -v npm > /dev/null || { echo "make docs fetches MathJax with npm, which is not here: install Node.js"; exit 1; }
	rm -rf build/mathjax
	mkdir -p build/mathjax $(MATHJAX)/output/chtml
	cd build/mathjax && npm pack --silent mathjax@3.2.2 && tar -xzf mathjax-3.2.2.tgz
	cp -R build/mathjax/package/es5/output/chtml/fonts $(MATHJAX)/output/chtml/
	cp build/mathjax/package/es5/tex-chtml.js $@

clean:
	rm -rf $(VENV) $(VENV)-oldest* $(VENV)-matrix build dist site *.egg-info
