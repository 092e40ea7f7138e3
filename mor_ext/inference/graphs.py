"""Work of fixed shapes: recorded once, as a CUDA graph, and then replayed on other data."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")
Work = Callable[[], T]  # reads and writes tensors that stay where they are, its result among them
Record = Callable[[Work[Any]], Work[Any]]  # to what does the same


class CudaGraphs:
    """Records work as CUDA graphs, which share the memory of what they hold in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work[T]) -> Work[T]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                work()  # what is made at its first call is not to be part of the graph
            with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):
                result = work()
            current.wait_stream(stream)

        def replay() -> T:
            graph.replay()
            return result

        return replay


class Buffers:
    """int32 arrays of fixed shapes, on the host and, after :meth:`send`, on the device."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        cuda = device.type == "cuda"
        self.memory = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=cuda)
        self.copy = torch.zeros_like(self.memory, device=device)
        self.sent = torch.cuda.Event() if cuda else None
        parts = self.memory.split(sizes), self.copy.split(sizes)
        self.host: dict[str, NDArray[np.int32]] = {}
        self.device: dict[str, torch.Tensor] = {}
        for (name, shape), host, there in zip(shapes.items(), *parts, strict=True):
            self.host[name], self.device[name] = host.view(shape).numpy(), there.view(shape)

    def put(self, name: str, values: NDArray[np.int32], padding: ArrayLike) -> None:
        """On the host, into the last dimension."""
        count = values.shape[-1]
        self.host[name][..., :count] = values
        self.host[name][..., count:] = padding

    def wait(self) -> None:
        """Until the host may write again."""
        if self.sent is not None:
            self.sent.synchronize()

    def send(self) -> None:
        self.copy.copy_(self.memory, non_blocking=True)
        if self.sent is not None:
            self.sent.record()


class FixedWork(ABC):
    """Work on arrays that are padded to fixed shapes; subclasses record it when they are ready."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self.buffers = Buffers(shapes, device)
        self.on = self.buffers.device

    def record(self, record: Record, padding: Any) -> None:
        """padding: arrays with nothing in them, so that recording changes nothing."""
        self.put(padding)
        self.buffers.send()
        self.replay = record(self.work)

    def __call__(self, arrays: Any) -> Any:
        self.buffers.wait()
        self.put(arrays)
        self.buffers.send()
        return self.replay()

    @abstractmethod
    def put(self, arrays: Any) -> None:
        """Into the buffers, padded."""

    @abstractmethod
    def work(self) -> Any:
        """On what the buffers hold on the device."""


def padded(count: int) -> int:
    """The least of 1, 2, 4, 8, 12, 16, 24, 32, 48, .. that is no less than count."""
    power = 1 << (count - 1).bit_length()
    between = power // 4 * 3
    return between if between > 8 and between >= count else power
