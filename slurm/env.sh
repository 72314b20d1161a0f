# shellcheck shell=bash disable=SC2034
# What a site changes; every job reads it. To keep your own beside this one: export OPD_ENV=/path/to/my-env.sh
# What a recipe says in its [slurm] section, or an override such as slurm.partition=debug, goes before what stands here.

# Account, partition and QOS are read by sbatch itself: `source slurm/env.sh` before it (pipeline.sh does that for you).
#export SBATCH_ACCOUNT=my_project
#export SBATCH_PARTITION=gpu
#export SBATCH_QOS=normal
# pipeline.sh: jobs without a GPU (checks, conversion) may go to a partition of their own.
CPU_PARTITION=
# pipeline.sh: how {n} GPUs of a node are asked for, for example --gres=gpu:h100:{n}
GPUS='--gpus-per-node={n}'

# The software of training (train, sft, check, convert) and of inference (generate, rollout, score, eval). Either images for Pyxis
# (a .sqsh file, or registry#name:tag; docs/containers.md), images for Apptainer (.sif), or, where an image is empty, virtual environments.
IMAGE_TRAIN=
IMAGE_SERVE=
# An image with both, for the job that compares the two; without one the training image is taken, if the recipe says how it finds SGLang
# (engine.launch.command, engine.urls), or else there is no such job.
IMAGE_ENGINES=
VENV_TRAIN=.venv
VENV_SERVE=.venv-serve
# What a container sees: the directory that you submit from always, and these (SOURCE:TARGET, with commas between).
MOUNTS=

# A job that was stopped (time limit, preemption) puts itself back into the queue; so often at most.
MAX_RESTARTS=20
# One that failed, and not by what you must mend, is tried again without the node that failed; so often at most.
RETRIES=2

# Where Triton, torch and CUDA keep what they compile, on each node's own disk; empty: ${SLURM_TMPDIR:-/tmp}/megatron-opd-$UID.
CACHE_DIR=

# Ranks on each node; empty: one a GPU.
RANKS_PER_NODE=

# NCCL and Megatron. Wrong interfaces are the usual reason of a hang at the first step: NCCL_DEBUG=INFO prints what was chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
#export NCCL_SOCKET_IFNAME=bond0        # the interface that all nodes reach each other by (`ip -br addr`); also of the rendezvous:
#export GLOO_SOCKET_IFNAME=bond0
#export NCCL_IB_HCA=mlx5_0,mlx5_1       # InfiniBand adapters for the data (`ibstat`), if NCCL picks a wrong one
#export NCCL_IB_GID_INDEX=3             # RoCE only
# Up to Hopper, Megatron overlaps tensor-parallel communication only with one hardware queue; on Blackwell take this out.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Packed batches differ in size: without this, fragments pile up until memory is short.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export HF_HUB_OFFLINE=1                 # compute nodes often have no internet: nothing is downloaded in a job
