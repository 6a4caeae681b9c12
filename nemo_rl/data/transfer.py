"""Moving tensors to a device without making the host wait for what the device is still doing."""

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device, or return it if it is there.

    A copy from ordinary memory to a GPU waits until the GPU has done all that it was given before; one from pinned
    memory takes its turn behind it, and PyTorch keeps the pinned memory until then.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
