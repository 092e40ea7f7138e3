"""The weights of a Hugging Face model by name: from its safetensors files, or from the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class Weight:
    place: str  # what errors call where it is
    read: Callable[[], Tensor]


class Checkpoint:
    """Tensors by name, read when they are asked for."""

    def __init__(self, place: str, weights: dict[str, Weight]) -> None:
        self.place = place
        self.weights = weights

    @staticmethod
    def of_model(model: nn.Module) -> Checkpoint:
        place, state = type(model).__name__, model.state_dict()
        weights = {name: Weight(place, partial(state.__getitem__, name)) for name in state}
        return Checkpoint(place, weights)

    @staticmethod
    def of_folder(folder: Path) -> Checkpoint:
        """Of ``model.safetensors``, or of the files in ``model.safetensors.index.json``.

        Raises:
            ValueError: a file is missing or cut short.
        """
        files: Iterable[str] = [WHOLE]
        if (folder / INDEX).is_file():
            files = sorted(set(_read_index(folder / INDEX).values()))
        elif not (folder / WHOLE).is_file():
            raise ValueError(f"{folder} must hold {WHOLE} or {INDEX}")
        weights = {}
        for path in (folder / file for file in files):
            held = _open(path)
            for name in held.keys():  # noqa: SIM118, it is no dict
                weights[name] = Weight(str(path), partial(held.get_tensor, name))
        return Checkpoint(str(folder), weights)

    def check_names(self, needed: Iterable[str], ignored: Iterable[str]) -> None:
        """ValueError for the first name that is needed and not there, or the other way round."""
        needed = set(needed)
        for name in sorted(needed - self.weights.keys()):
            raise ValueError(f"{name} must be in {self.place}, but is missing")
        for name in sorted(self.weights.keys() - needed - set(ignored)):
            raise ValueError(f"{name} in {self.weights[name].place} must not be there")

    def dtype(self, name: str) -> torch.dtype:
        return self.weights[name].read().dtype

    def copy_mean(self, names: Sequence[str], target: Tensor) -> None:
        """Overwrites target by the mean of tensors of its shape, rounded once.

        Raises:
            ValueError: a tensor has another shape.
        """
        mean = self._read(names[0], target.shape)
        if len(names) > 1:
            mean = mean.double()
            for name in names[1:]:
                mean = mean + self._read(name, target.shape).double()
            mean = mean / len(names)
        target.copy_(mean)

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        weight = self.weights[name]
        tensor = weight.read()
        if tensor.shape != shape:
            raise ValueError(
                f"{name} in {weight.place} must be of shape {list(shape)}, got {list(tensor.shape)}"
            )
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        files = json.loads(path.read_text())["weight_map"]
        assert all(isinstance(file, str) for file in files.values())
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path} must be the index of a checkpoint, got {error!r}") from error
    return files


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise ValueError(f"{path} must be there, but is missing")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from error
