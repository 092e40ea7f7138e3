"""Text as bytes: where it comes from, its split, batches, and a bigram table to compare with."""

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
NOT_PROSE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "encodings",
    "pydoc_data",
}


@dataclass
class Text:
    """Bytes to learn from and bytes held out, each uint8 ``[length]``."""

    train: Tensor
    held_out: Tensor

    @staticmethod
    def split(data: bytes, held_out: float = 0.1) -> "Text":
        """Holds out the end of the data."""
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        size = int(len(data) * held_out)
        return Text(tensor[: len(data) - size], tensor[len(data) - size :])

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """int64 ``[size, length]``: windows at random places of the training bytes."""
        last = len(self.train) - length
        start = torch.randint(last + 1, (size, 1), generator=generator)
        return self.train[start + torch.arange(length)].long()

    def windows(self, length: int, count: int) -> Tensor:
        """int64 ``[<= count, length]``: the first windows of the held-out bytes, end to end."""
        count = min(count, len(self.held_out) // length)
        return self.held_out[: count * length].view(count, length).long()


def read_text(path: str | Path, least: int) -> bytes:
    """The bytes of a file; ValueError if there are fewer than ``least``."""
    data = Path(path).read_bytes()
    if len(data) < least:
        raise ValueError(f"{path} must have at least {least} bytes, got {len(data)}")
    return data


def stdlib_text(limit: int) -> bytes:
    """Source of the Python standard library, whole files in a fixed random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        p for p in sorted(root.rglob("*.py")) if NOT_PROSE.isdisjoint(p.relative_to(root).parts)
    ]
    random.Random(0).shuffle(files)
    data = bytearray()
    for path in files:
        if len(data) >= limit:
            break
        data += path.read_bytes() + b"\n"
    return bytes(data[:limit])


def bigram_nll(text: Text, windows: Tensor, smoothing: float = 0.1) -> float:
    """Nats a byte of ``windows`` (int64 ``[count, length]``) under a table of byte pairs.

    The table counts the training bytes, with ``smoothing`` added to every pair. As for a model,
    the first byte of a window is not scored.
    """
    pairs = text.train[:-1].long() * VOCAB_SIZE + text.train[1:].long()
    counts = torch.bincount(pairs, minlength=VOCAB_SIZE**2).view(VOCAB_SIZE, VOCAB_SIZE)
    counts = counts.double() + smoothing
    log_probs = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -log_probs[windows[:, :-1], windows[:, 1:]].mean().item()
