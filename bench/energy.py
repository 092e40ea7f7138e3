"""What NVML says that a GPU has used; Volta and later count it."""

from __future__ import annotations

from typing import Any

import torch


class Energy:
    """
    Attributes:
        missing: why there is nothing to read, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        self.nvml: Any = None
        if device.type != "cuda":
            self.missing = f"no counter for {device.type}"
            return
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed"
            return
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        except pynvml.NVMLError as problem:
            self.missing = f"NVML: {problem}"
        else:
            self.nvml = pynvml

    def joules(self) -> float | None:
        """Since the driver was loaded."""
        if self.nvml is None:
            return None
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3
