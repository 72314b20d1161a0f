#!/usr/bin/env bash
# Each task of a step runs its command through this script, so that what is compiled for a GPU goes to the node's own disk, not to a home
# directory that all nodes share.   task.sh [--deaf] COMMAND ...     with --deaf the command ignores USR1 and TERM until the trainer can save.
if [[ $1 == --deaf ]]; then
    trap '' USR1 TERM
    shift
fi
# usable DIRECTORY: created if it does not exist. Programs are run from it, so it must not belong to anybody else.
usable() {
    (umask 077 && mkdir -p "$1") 2>/dev/null
    [[ -d $1 && ! -L $1 && -O $1 ]] && chmod 700 "$1"
}
cache=${CACHE_DIR:-${SLURM_TMPDIR:-/tmp}/megatron-opd-$UID}
if ! usable "$cache"; then
    other=${SLURM_TMPDIR:-/tmp}/megatron-opd-$UID-${SLURM_JOB_ID:-0}
    usable "$other" || { echo "task.sh: neither $cache nor $other is a directory of ours to compile into; set CACHE_DIR" >&2 && exit 2; }
    echo "task.sh: $cache is no directory of ours; what is compiled goes to $other" >&2
    cache=$other
fi
export HF_HOME=${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface} # data sets stay where they are
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/torch_extensions
export CUDA_CACHE_PATH=$cache/cuda XDG_CACHE_HOME=$cache/xdg FLASHINFER_WORKSPACE_BASE=$cache SGLANG_DG_CACHE_DIR=$cache/deep_gemm
if [[ -n ${OPD_BINDS:-} ]]; then # what apptainer shows to the container
    export APPTAINER_BIND=$OPD_BINDS,$cache SINGULARITY_BIND=$OPD_BINDS,$cache
fi
exec "$@"
