"""Whether somebody looks on: hooks are to see what the modules of the model's own would have given them."""

from torch import nn


def watched(*modules: nn.Module | None) -> bool:
    """Whether one of them has hooks."""
    return any(m is not None and bool(m._forward_hooks or m._forward_pre_hooks) for m in modules)
