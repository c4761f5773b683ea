#!/usr/bin/env bash
# One node:                launch/torchrun.sh --config configs/llama-3.1-8b-instruct.yaml -c configs/strategy/fsdp2.yaml
# Several (on each node):  NODES=4 NODE_RANK=0 MAIN=node0.cluster launch/torchrun.sh --config ...
# Without GPUs:            GPUS=2 launch/torchrun.sh --config ... -c configs/strategy/cpu-fsdp2.yaml
#   --trainer.default_root_dir (runs, by default) must be a folder that all nodes share, under the same path: of a
#   sharded checkpoint each process writes its part there, and rank zero everything else. Sharded runs check it.
# Elastic (on each node):  NODES=2:4 MAIN=node0.cluster launch/torchrun.sh --config ...
#   a node may go or come; the run starts again with those that are there. Give --ckpt_path last, so that it goes on.
set -euo pipefail

# -- change these ----------------------------------------------------------------------------------------------------
NODES=${NODES:-1}                  # how many, or least:most
GPUS=${GPUS:-gpu}                  # processes on each node: gpu is one for each GPU, or a number
MAIN=${MAIN:-127.0.0.1}            # the first node, as the others reach it
PORT=${PORT:-29500}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# batches differ in length: the allocator then grows its segments instead of keeping gaps (older torch releases call the
# variable PYTORCH_CUDA_ALLOC_CONF)
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# NCCL finds InfiniBand and RoCE devices by itself; name them if there are others: export NCCL_IB_HCA=mlx5_0,mlx5_1
ulimit -l unlimited 2>/dev/null || true    # RDMA pins memory; where it can't be raised, NCCL says so
# --------------------------------------------------------------------------------------------------------------------

most=${NODES#*:}
if [ "$NODES" != "$most" ]; then
    how=(--rdzv_backend=c10d --rdzv_endpoint="$MAIN:$PORT" --rdzv_id="${RUN_ID:-rap-lightning}" --max_restarts=3)
    most=\$GROUP_WORLD_SIZE        # as many as came: known to the processes only
elif [ "$NODES" = 1 ]; then
    how=(--standalone)
else
    how=(--node_rank="${NODE_RANK:?the number of this node, from 0}" --master_addr="$MAIN" --master_port="$PORT")
fi
# torchrun says to each process how many nodes and processes there are; Lightning wants it said
# shellcheck disable=SC2016
exec torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" "${how[@]}" --no-python \
    bash -c 'exec rap-lightning fit "$@" --trainer.num_nodes "'"$most"'" --trainer.devices "$LOCAL_WORLD_SIZE"' fit "$@"
