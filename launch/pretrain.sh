#!/usr/bin/env bash
# One stage as a job of Slurm:  launch/pretrain.sh CONFIG [key.sub=value ...] --profile FILE [--nodes MIN-MAX] [--dry-run]
set -euo pipefail
PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m launch.slurm submit "$@"
