"""Images that the runs of these tests train on."""

from digits import digits

__all__ = ["digits"]
