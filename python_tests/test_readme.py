"""The README does what it says: its snippets run, its names exist."""

import re
from pathlib import Path

import pytest
import torch

import mor_ext

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_snippets_run() -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    namespace: dict[str, object] = {}  # one session, as a reader would paste them
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    hidden, output = namespace["hidden"], namespace["output"]
    assert isinstance(hidden, torch.Tensor) and hidden.shape == (1024, 256)
    assert output.depth.shape == (2, 128)  # type: ignore[attr-defined]


def test_table_names_every_op() -> None:
    section = README.split("## The ops")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text())
    assert named == {name for name in schemas if not name.endswith("_bwd")} - {"set_debug"}
    for name in named:
        assert getattr(mor_ext.ops, name).__doc__, f"mor_ext.ops.{name} has no docstring"


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_local_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if "://" not in link:
            file = (ROOT / page).parent / link.partition("#")[0]
            assert file.exists(), f"{page}: {link} does not exist"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = set(re.findall(r"(?:^    |`)make ([\w-]+)", README, re.MULTILINE))
    assert wanted and wanted <= targets, f"not in the Makefile: {wanted - targets}"
