"""Shards to batches. `open_training`, `open_dataset`, `check_labels` and `facts` come before the plan, the loaders after it.

`pretrain.data.loader` imports torch and is imported by its own name; the rest does not.
"""

from pretrain.data.dataset import Dataset, facts, open_dataset
from pretrain.data.labels import check_labels
from pretrain.data.sources import open_training

__all__ = ["Dataset", "check_labels", "facts", "open_dataset", "open_training"]
