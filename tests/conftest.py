"""One thread a test process: as quick for models of this size, and they may run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
