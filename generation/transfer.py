"""Small host data on its way to the model's device, without waiting for it.

A decode step reads the sampled tokens back from the device and must wait for nothing else: on CUDA, what goes the
other way comes from pinned memory and is copied behind the host's back.
"""

from collections.abc import Sequence

import torch


def on_device(values: Sequence, device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """`torch.tensor(values)` on `device`, which on CUDA is not synchronised with."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor if device.type == "cpu" else tensor.to(device)
