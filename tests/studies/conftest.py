"""Real shards to study on."""

from digits import digits

__all__ = ["digits"]
