"""What must be said before torch and triton are imported: threads and compilers for each of several processes, and
the interpreter.

Where there is no GPU, Triton's interpreter runs its kernels.
"""

import os

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    for name in ("OMP_NUM_THREADS", "HUMMING_MAX_PARALLEL_BUILD_WORKERS"):
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // workers)))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
