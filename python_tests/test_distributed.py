"""Two gloo processes, by DDP and by FSDP2, give what one process gives on the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import CASES, SAVED, STEPS, run

from mor_ext.models import MoRForCausalLM

ROOT = Path(__file__).parents[1]
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes left their results and checkpoints: started once for all tests."""
    folder = tmp_path_factory.mktemp("two")
    result = subprocess.run(
        [sys.executable, *LAUNCH, Path(__file__).with_name("two_processes.py"), folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_numbers_of_one(case, way, two, tmp_path):
    one, other = run(case, tmp_path, 1, sharded=False), two[f"{case} {way}"]
    assert len(one["loss"]) == STEPS
    for name, values in one.items():
        assert other[name] == pytest.approx(values, rel=1e-5), name


def test_a_sharded_run_resumes_where_it_was(two):
    before, resumed = two["token_choice fsdp"], two["resumed"]
    assert resumed == before  # the log goes on from the checkpoint's


def test_a_sharded_checkpoint_is_a_whole_model(folder):
    whole, sharded = (
        MoRForCausalLM.from_pretrained(folder / f"expert_choice_{way}" / f"checkpoint-{SAVED}")
        for way in ("ddp", "fsdp")
    )
    expected = whole.state_dict()
    for name, tensor in sharded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
