"""The most memory that was in use while something ran."""

from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """`with PeakMemory(device) as peak:`, then `peak.bytes`.

    On a GPU it counts what torch has allocated; on Linux without one, the whole process in main memory. Elsewhere, and
    where the system does not let the count be reset, it is `None`.

    Args:
        device (`torch.device`): where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._counts = False

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                _CLEAR.write_text("5")
                self._counts = True
            except OSError:
                pass
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._counts:
            (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
            self.bytes = int(line.split()[1]) * 1024
