"""Where there is no GPU, Triton's interpreter runs its kernels. It must be told before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
