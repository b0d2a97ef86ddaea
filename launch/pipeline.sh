#!/usr/bin/env bash
# Stages one after the other, then evaluation and export:  launch/pipeline.sh CONFIG CONFIG --profile FILE [--dry-run]
set -euo pipefail
PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m launch.slurm chain "$@"
