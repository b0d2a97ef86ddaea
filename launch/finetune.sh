#!/usr/bin/env bash
# The same for a stage that starts when the run of its init.from is finished:  launch/finetune.sh CONFIG --profile FILE
set -euo pipefail
PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m launch.slurm submit --after-init "$@"
