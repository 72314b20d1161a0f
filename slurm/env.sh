# shellcheck shell=bash disable=SC2034
# Settings of the site, which every job sources. To use your own copy instead: export OPD_ENV=/path/to/my-env.sh
# A recipe's [slurm] section, or an override such as slurm.partition=debug, takes precedence over this file.

# sbatch itself reads account, partition and QOS: `source slurm/env.sh` before you call it (pipeline.sh does that for you).
#export SBATCH_ACCOUNT=my_project
#export SBATCH_PARTITION=gpu
#export SBATCH_QOS=normal
# pipeline.sh: the partition for jobs without a GPU (checks, conversion), if it is another one.
CPU_PARTITION=
# pipeline.sh: how to request {n} GPUs of a node, for example --gres=gpu:h100:{n}
GPUS='--gpus-per-node={n}'

# The software for training (train, sft, check, convert) and for inference (generate, rollout, score, eval): images for Pyxis
# (a .sqsh file, or registry#name:tag; docs/containers.md), images for Apptainer (.sif), or, if an image is empty, virtual environments.
IMAGE_TRAIN=
IMAGE_SERVE=
# An image with both, for the job that compares the two. Without one, the training image is used if the recipe says where SGLang is
# (engine.launch.command, engine.urls); otherwise there is no such job.
IMAGE_ENGINES=
VENV_TRAIN=.venv
VENV_SERVE=.venv-serve
# Mounts of a container, besides the directory that you submit from (SOURCE:TARGET, separated by commas).
MOUNTS=

# How often a job that was stopped (time limit, preemption) may requeue itself.
MAX_RESTARTS=20
# How often a failed job is tried again without the node at fault, unless the failure is one that you must fix.
RETRIES=2

# Where Triton, torch and CUDA cache what they compile, on each node's own disk; empty: ${SLURM_TMPDIR:-/tmp}/megatron-opd-$UID.
CACHE_DIR=

# Ranks on each node; empty: one per GPU.
RANKS_PER_NODE=

# NCCL and Megatron. A wrong interface is the usual cause of a hang at the first step: NCCL_DEBUG=INFO prints the choice.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
#export NCCL_SOCKET_IFNAME=bond0        # the interface by which all nodes reach each other (`ip -br addr`); also for the rendezvous:
#export GLOO_SOCKET_IFNAME=bond0
#export NCCL_IB_HCA=mlx5_0,mlx5_1       # InfiniBand adapters for the data (`ibstat`), if NCCL picks a wrong one
#export NCCL_IB_GID_INDEX=3             # RoCE only
# Up to Hopper, Megatron overlaps tensor-parallel communication only with one hardware queue; remove this on Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Packed batches differ in size: without this, fragmentation grows until memory runs out.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export HF_HUB_OFFLINE=1                 # compute nodes often have no internet: nothing is downloaded in a job
