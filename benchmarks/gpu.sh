#!/usr/bin/env bash
# On a machine with a GPU: checks every kernel there, then times decode and training against the byte floor and against
# SDPA, FlexAttention and flash-attn (where it is installed). Needs an environment with a CUDA build of torch and this
# project (`pip install -e ".[cli,kernels]"`). Nothing is claimed of a GPU that this has not been run on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TRITON_INTERPRET=0
python -m multiverse kernels --attn-implementation multiverse --dtype bfloat16
python -m benchmarks.gpu "$@"
