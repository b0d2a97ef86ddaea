"""Ports for servers that are started a moment later, or stopped and started again."""

import random
import socket

_LOWEST, _HIGHEST = 20_000, 30_000
"""Below what Linux hands out to whoever names no port (from 32768 on), so that no connection takes one meanwhile; above
those that the batch script gives to the first jobs of a cluster."""


def free_port() -> int:
    """A port at which nobody listens."""
    chance = random.SystemRandom()  # other sessions of tests, which draw too, have to draw otherwise
    while True:
        port = chance.randrange(_LOWEST, _HIGHEST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
