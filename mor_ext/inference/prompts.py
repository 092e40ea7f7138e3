"""Prompts from a file or from stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def read_prompts(file: str) -> list[str]:
    """A prompt a line, or the "prompt" of JSON Lines: what the first line is, all must be.

    Args:
        file: UTF-8; "-" is stdin.

    Raises:
        ValueError: no such file, not UTF-8, no lines, or a line without a prompt.
    """
    name = "stdin" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts must be in a UTF-8 file, got {name}: {error}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"prompts must be at least one, got none in {name}")
    if _prompt_of(lines[0]) is None:
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt = _prompt_of(line)
        if prompt is None:
            raise ValueError(
                f'{name} must have a "prompt" in every line, as in its first, got {line[:40]!r} '
                f"in line {number}"
            )
        prompts.append(prompt)
    return prompts


def _prompt_of(line: str) -> str | None:
    """The "prompt" of a JSON object; None if the line is none that has one."""
    try:
        item = json.loads(line)
    except json.JSONDecodeError:
        return None
    prompt = item.get("prompt") if isinstance(item, dict) else None
    return prompt if isinstance(prompt, str) else None
