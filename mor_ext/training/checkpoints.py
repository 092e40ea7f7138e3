"""Checkpoints of a run: which there are, and whether one is whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, the latest first."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def last_whole(output: str | Path) -> Path | None:
    """The latest checkpoint that is whole: a run may have ended while it wrote one."""
    for path in checkpoints(output):
        try:
            check(path)
        except ValueError:
            continue
        return path
    return None


def check(path: Path) -> None:
    """Raises ValueError if a checkpoint is not whole, with the file that is not."""
    if not path.is_dir():
        raise ValueError(f"checkpoint must be a folder, got {path}")
    weights = sorted(path.glob("*.safetensors")) or [path / "model.safetensors"]
    for file in [*weights, path / OPTIMIZER, path / "scheduler.pt", path / STATE]:
        try:
            _read(file)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"checkpoint must be whole, got {file}: {str(error).splitlines()[0]}"
            ) from error


def _read(file: Path) -> None:
    """As much of a file as shows that its end is there."""
    if not file.exists():
        raise ValueError("no such file")
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            tensors.keys()
    elif file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    else:  # what torch.save writes is a zip file, whose directory is at its end
        zipfile.ZipFile(file).close()
