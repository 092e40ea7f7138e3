"""The README does what it says: its snippets run, its names exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mor_ext

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def run_snippets(page: str) -> dict[str, Any]:
    """What the page's snippets leave, in one session, as a reader would paste them."""
    text = (ROOT / page).read_text()
    namespace: dict[str, Any] = {"__name__": page}
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(snippet, page, "exec"), namespace)
    return namespace


def test_snippets_of_the_readme_run() -> None:
    namespace = run_snippets("README.md")
    assert namespace["hidden"].shape == (1024, 256)
    assert namespace["output"].depth.shape == (2, 128)
    text = namespace["text"]
    logits = namespace["llama"].eval()(text).logits
    torch.testing.assert_close(namespace["same"](text).logits, logits, atol=1e-4, rtol=1e-4)
    assert namespace["recursive"](text).depth.max() <= 3


def test_snippets_about_models_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_snippets("docs/models.md")
    assert namespace["model"](namespace["text"]).depth.float().mean() > 0


def test_table_names_every_op() -> None:
    section = README.split("## The ops")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    schemas = re.findall(r'"(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text())
    assert named == {name for name in schemas if not name.endswith("_bwd")} - {"set_debug"}
    for name in named:
        assert getattr(mor_ext.ops, name).__doc__, f"mor_ext.ops.{name} has no docstring"


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if "://" not in link:
            file = (ROOT / page).parent / link.partition("#")[0]
            assert file.exists(), f"{page}: {link} does not exist"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = set(re.findall(r"(?:^    |`)make ([\w-]+)", README, re.MULTILINE))
    assert wanted and wanted <= targets, f"not in the Makefile: {wanted - targets}"
