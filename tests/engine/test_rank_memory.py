"""A rank's memory does not grow with the number of batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.jobs import ENVIRONMENT

SCRIPT = """
import json, sys
sys.path.insert(0, TESTS)
import torch
from helpers.models import small_model
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.kernels.torch_setup import prepare_torch

if len(sys.argv) > 1:
    prepare_torch(threads=1, deterministic=False)
torch.set_num_threads(1)

def resident():
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmRSS")).split()[1])

model, sizes = small_model("gpt2"), []
with GradProjLoraEngine(model, "mlp,attn", freeze_weights=True) as engine:
    for i in range(241):
        ids = torch.randint(3, 60, (1 + i % 5, 2 + i % 31))
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()
        if i in (40, 240):
            sizes.append(resident())
print(json.dumps(sizes))
"""


def growth(*arguments):
    """Bytes by which 200 batches of ever other shapes grow a process."""
    script = SCRIPT.replace("TESTS", repr(str(Path(__file__).parents[1])))
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    first, last = json.loads(done.stdout.splitlines()[-1])
    return last - first


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="/proc tells a process's memory on Linux only"
)
def test_memory_does_not_grow_with_new_batch_shapes():
    assert growth("as the job") < 40e6
