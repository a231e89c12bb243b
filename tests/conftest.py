"""What must be said before torch and triton are imported: threads for each of several processes, and the interpreter.

Where there is no GPU, Triton's interpreter runs its kernels.
"""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
