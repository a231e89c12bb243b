"""A device by name, as every verb that runs a model is given it."""

import torch

from fewbit.errors import RequestError


def present(device: str | torch.device) -> torch.device:
    """Refuse a device that is not here, and start nothing on one that is. auto: a GPU where there is one."""
    try:
        found = torch.device(device if device != "auto" else "cuda" if torch.cuda.device_count() else "cpu")
    except RuntimeError as error:
        raise RequestError(f"device {device!r}: {str(error).splitlines()[0]}; auto takes what is there") from error
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if found.type == "cuda" and (found.index or 0) >= count:
        raise RequestError(f"device {str(device)!r}: torch sees {count} such devices here; auto takes what is there")
    return found
