"""What holds for every test: no thread storms, no deadlines on a busy machine."""

import os

from hypothesis import settings

# Read by torch's and numpy's thread pools when they are first imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("pretrain", deadline=None)
settings.load_profile("pretrain")
