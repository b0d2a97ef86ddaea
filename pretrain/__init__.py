"""Pretrain Vision Transformers: WebDataset shards in, DeepSpeed ZeRO in the middle, portable checkpoints out."""

__version__ = "0.1.0"
