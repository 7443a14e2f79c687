"""The same seed on the same machine gives the same weights and records, in whichever process; no two runs meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics import read_run

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

# A model as the trainer's own, which leaves a checksum of its weights in its job's folder whenever it is evaluated.
NETS = """
import hashlib
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from diagnostics.trainers.gpt import GPT


class Net(GPT):
    def eval(self):
        weights = b"".join(parameter.detach().numpy().tobytes() for parameter in self.parameters())
        with (Path(HydraConfig.get().runtime.output_dir) / "weights.txt").open("a") as file:
            print(hashlib.sha256(weights).hexdigest(), file=file)
        return super().eval()
"""
SMALL = (
    "task=pysource",
    "task.context=8",
    "~model",
    "+model={_target_: their_nets.Net, depth: 1, width: 8, heads: 2, dropout: 0.2}",
    "trusted_packages=[their_nets]",
    "trainer.steps=6",
    "trainer.batch_size=8",
    "trainer.micro_batches=2",
    "trainer.evaluate_every=2",
    "trainer.device=cpu",
    "sink=[runlog]",
)


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


def what_happened(log):
    """Weights at every evaluation, and all that the records say."""
    records = [(repr(record), [repr(layer) for layer in record.layers]) for record in read_run(log).records]
    return (log.parent / "weights.txt").read_text().splitlines(), records


def test_a_job_is_the_same_bit_by_bit_alone_after_another_and_in_a_parallel_worker(tmp_path):
    (tmp_path / "their_nets.py").write_text(NETS)
    finish(start(tmp_path, *SMALL, "trainer.seed=1", "hydra.run.dir=alone"))
    for launcher in ("basic", "joblib"):
        places = ("hydra.sweep.dir=" + launcher, "hydra/launcher=" + launcher)
        finish(start(tmp_path, "-m", *SMALL, "trainer.seed=1,2,1", *places))
    alone = what_happened(tmp_path / "alone" / "run.jsonl")
    weights, records = alone
    assert (len(records), len(weights), len(set(weights))) == (6, 5, 5)  # steps 0, 2, 4, 5 and the end, all different
    for launcher in ("basic", "joblib"):
        first, other, last = map(what_happened, sorted((tmp_path / launcher).glob("*/run.jsonl")))
        assert first == last == alone
        assert other[0][0] != weights[0]


def test_programs_that_start_at_once_have_folders_of_their_own(tmp_path):
    (tmp_path / "their_nets.py").write_text(NETS)
    finish(*(start(tmp_path, *SMALL) for _ in range(3)), start(tmp_path, "-m", *SMALL), start(tmp_path, "-m", *SMALL))
    single, swept = (sorted(tmp_path.glob(f"{place}/run.jsonl")) for place in ("outputs/*", "multirun/*/*"))
    assert (len(single), len(swept)) == (3, 2)
    assert {read_run(log).end.status for log in (*single, *swept)} == {"finished"}
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs", "multirun", "their_nets.py", "__pycache__"}
