"""A run whose models lie on a device that is not the CPU, as on a GPU: nothing may be left on the CPU by mistake."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REFUSES = """
import pytest, torch, pretend_device
x = torch.ones(2, 3, device=pretend_device.register(), requires_grad=True)
((x * 2).sum() + x.T.reshape(-1)[1:].exp().sum()).backward()
assert x.grad.device.type == pretend_device.NAME
truth = torch.ones(2, 3, requires_grad=True)
((truth * 2).sum() + truth.T.reshape(-1)[1:].exp().sum()).backward()
assert torch.equal(x.grad.cpu(), truth.grad)
assert x[torch.tensor([1])].tolist() == [[1.0, 1.0, 1.0]]
place = torch.tensor([0])
for mixed in (lambda: x + torch.ones(3), lambda: x @ torch.ones(3, 2), lambda: x.index_add(0, place, x[:1])):
    with pytest.raises(RuntimeError, match="same device"):
        mixed()
"""


def called(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_pretended_device_computes_and_refuses_tensors_of_the_cpu():
    done = called("-c", REFUSES)
    assert done.returncode == 0, done.stderr


def test_a_run_on_another_device_trains_as_on_the_cpu(data, model_folder, tmp_path):
    """Supervised start, LoRA members, both policies and evaluation; DPO's course is that of the CPU up to rounding."""
    given = [f"--data={data}", f"--model={model_folder}", "--precision=float32", "--distill.epochs=3"]
    given += ["--sft.enabled=true", "--reward.hold=lora", "--reward.adapters=true", "--gradient-checkpointing=always"]
    given += ["--evaluate.max_new_tokens=6", "--sample.max_new_tokens=6", "--evaluate.chosen_prompts=4"]
    away, here = tmp_path / "away", tmp_path / "here"
    for command in (
        [str(HERE / "on_pretend_device.py"), "run", *given, "--methods=dpo,e-dpo", f"--output-dir={away}"],
        ["-m", "prefdistill", "distill", *given, "--methods=dpo", f"--output-dir={here}"],
    ):
        done = called(*command)
        assert done.returncode == 0, done.stderr[-3000:]

    course, truth = (json.loads((out / "policy" / "dpo" / "history.json").read_text()) for out in (away, here))
    assert len(course) == len(truth) > 1
    for line, true in zip(course, truth, strict=True):
        for name in ("loss", "logps/chosen", "rewards/margins"):
            assert line[name] == pytest.approx(true[name], rel=1e-4, abs=1e-4), name
    distilled = json.loads((away / "policy" / "e-dpo" / "history.json").read_text())
    assert all(math.isfinite(value) for line in distilled for value in line.values())
