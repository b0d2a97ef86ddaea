"""A checkpoint committed at once, for tests that are about what becomes of it."""

from pathlib import Path

from pretrain.checkpoint.save import Content, Saver
from pretrain.distributed import Ranks


def save(run: Path, content: Content, ranks: Ranks) -> Path:
    saver = Saver(run, ranks)
    saver.begin(content)
    return saver.commit()
