# Two images from one file, because SGLang and Megatron pin different versions of torch (docs/containers.md: building, pushing, enroot):
#   docker build --target train -t opd-train .
#   docker build --target serve -t opd-serve .
# Layers go from what changes least to what changes most: a change of the code rebuilds the last two.
ARG TRAIN_BASE=nvcr.io/nvidia/pytorch:26.06-py3
ARG SERVE_BASE=lmsysorg/sglang:v0.5.23

# ---- train: Megatron-Core, Transformer Engine, apex ---------------------------------------------------------------------------------
FROM ${TRAIN_BASE} AS train
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The base constrains every package to what it has; below only torch's family and NumPy are held.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --create-home --uid 10001 opd

# Transformer Engine is the base's own, built for its torch. apex: fused Adam, norms and gradient accumulation, built from source.
# CUDA_EXTENSIONS=no leaves both out, for an image without a GPU.
ARG CUDA_EXTENSIONS=yes
ARG APEX_COMMIT=10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0"
RUN if [ "${CUDA_EXTENSIONS}" = yes ]; then \
        python3 -c "from importlib.metadata import version; print('transformer-engine', version('transformer-engine'))"; \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=8 NVCC_APPEND_FLAGS="--threads 4" \
            pip install --no-build-isolation --no-deps --force-reinstall "git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}"; \
    fi

ARG MEGATRON_CORE_VERSION=0.19.2
COPY docker/train.txt /tmp/requirements.txt
RUN pip list --format=freeze | grep -E '^(torch|triton|pytorch-triton|numpy)==' >/tmp/base.txt; \
    pip install -c /tmp/base.txt -r /tmp/requirements.txt; \
    pip install --no-deps "megatron-core==${MEGATRON_CORE_VERSION}"

COPY . /opt/megatron_opd
RUN pip install --no-deps --no-build-isolation /opt/megatron_opd; \
    python3 -c "import opd_kernels, megatron_opd.train.loop"
USER 10001
WORKDIR /workspace
CMD ["megatron-opd", "--help"]

# ---- serve: SGLang ------------------------------------------------------------------------------------------------------------------
FROM ${SERVE_BASE} AS serve
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --create-home --uid 10001 opd

# Nothing that SGLang came with may change.
COPY docker/serve.txt /tmp/requirements.txt
RUN pip list --format=freeze >/tmp/base.txt; \
    pip install -c /tmp/base.txt -r /tmp/requirements.txt

COPY . /opt/megatron_opd
RUN pip install --no-deps /opt/megatron_opd; \
    python3 -c "import megatron_opd.serve.score, megatron_opd.evaluate.run"
USER 10001
WORKDIR /workspace
CMD ["megatron-opd", "--help"]
