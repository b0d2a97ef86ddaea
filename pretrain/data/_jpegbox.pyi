from pretrain.data.box import Pixels

def size_of(data: memoryview | bytes, /) -> tuple[int, int, int] | None:
    """(height, width, components) of a plain JPEG by its header, else None."""

def decode(
    data: memoryview | bytes, out: Pixels, top: int, left: int, height: int, width: int, channels: int, /
) -> bool:
    """Fill out, uint8 [height, width, channels], with a box of a JPEG, and say so; else nothing is known of the file."""
