"""How many scans a JPEG asks its decoder for: the one way in which a small file costs minutes.

A progressive JPEG, or one with a scan for each component, may go over the whole picture any number of times at a
hundred bytes a scan. Encoders write about ten, at most some dozens. Markers as in ITU-T T.81, B.1.
"""

import struct

MAX_SCANS = 200

_SOS, _EOI = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ALONE = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xD9)})
"""What may follow FF without a length: stuffing, fill bytes, restarts, the start of the file."""


def has_too_many_scans(data: memoryview | bytes) -> bool:
    """Whether a JPEG has more than `MAX_SCANS` scans; microseconds where it is a sequential one, as most are."""
    if _is_one_scan(data):
        return False
    content = bytes(data)
    return content.count(bytes([0xFF, _SOS])) > MAX_SCANS and _count(content) > MAX_SCANS


def _is_one_scan(data: memoryview | bytes) -> bool:
    """Whether the first scan is all of a picture that is not progressive. False where that cannot be told."""
    at, components = 2, 0
    try:
        while True:
            start, marker, length = struct.unpack_from(">BBH", data, at)
            if start != 0xFF or marker in _PROGRESSIVE or marker in _ALONE:
                return False
            if marker in _FRAMES:
                components = data[at + 9]
            if marker == _SOS:
                return 0 < components <= data[at + 4]
            at += 2 + length
    except (struct.error, IndexError):
        return False


def _count(content: bytes) -> int:
    """Scans up to the end of the picture, or one more than `MAX_SCANS`: what phones append to a file may be a film."""
    at = scans = 0
    while scans <= MAX_SCANS and 0 <= (at := content.find(b"\xff", at)) < len(content) - 3:
        marker = content[at + 1]
        if marker == _EOI:
            break
        scans += marker == _SOS
        at += 1 if marker in _ALONE else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return scans
