"""Metrics, parameters and status of a run: written down at once, delivered to MLflow when MLflow is there.

1. `records`   the lines of the journal: what they hold, which values are allowed
2. `journal`   rank 0 appends one line per call, without secrets, to `RUN/metrics.jsonl`; this file is the truth
3. `tracker`   what the trainer talks to: a journal, and the drainer process that reads it
4. `drain`     that process; `progress` is its note of how far it came, `target` the address it was given, `mounts`
               what speaks against a file there
5. `deliver`   journal lines to MLflow's entities, in order, again and again until they are there
6. `store`     MLflow's side: runs found or created, errors sorted
7. `watch`     5 and 6 for many runs, from a node that has a route to MLflow
8. `system`    how busy each node is, through the same journal

Only 5 to 7 import mlflow or wait for a network, and training imports none of them.
"""

from pretrain.tracking.journal import Journal
from pretrain.tracking.system import SystemMetrics
from pretrain.tracking.tracker import Tracker

__all__ = ["Journal", "SystemMetrics", "Tracker"]
