#!/bin/bash
# Measures everything of the GPU table on a machine with one NVIDIA GPU and no network, in under ten minutes.
# Needs a python3 with jax for CUDA, flax, optax, rich, tyro, torch, transformers and timm. Usage: gpu_session.sh FOLDER
set -u
folder=${1:?usage: benchmarks/gpu_session.sh FOLDER}
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=80
for variant in ${VARIANTS:-s12 m36}; do
  peers="transformers timm"
  # The memory of one GPU does not hold three training programs of m36 at a batch of 256.
  [ "$variant" = m36 ] && peers="transformers"
  for work in ${WORK:-inference training}; do
    python3 -m benchmarks gpu --variants "$variant" --work "$work" --peers $peers --rounds 5 --seconds 0.5 \
      --json "$folder/gpu-$variant-$work.json" 2>&1
  done
done
