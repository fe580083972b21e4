"""The compiled code under the compiler's own checks of memory, as this CPU runs it and as one with AVX-512 and AMX.

On other CPUs the latter goes by stand-ins for their instructions (wide/), so that no code goes out that never ran.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefdistill.native import library

HERE = Path(__file__).parent
COMPILED = library.library()
needs_kernel = pytest.mark.skipif(COMPILED is None, reason="no compiler, or a CPU without AVX2")
CHECKED = (*library.FLAGS, "-O1", "-g", "-fsanitize=address")


def preloaded(cxx: str) -> dict[str, str]:
    """An environment in which Python runs under the checks."""
    said = subprocess.run(
        [cxx, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return {**os.environ, "LD_PRELOAD": said, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}


@needs_kernel
@pytest.mark.parametrize("wide", [False, True], ids=["this CPU", "AVX-512 and AMX"])
def test_no_byte_is_touched_beyond_its_own(wide, tmp_path):
    cxx = library.compiler()
    env = preloaded(cxx)
    if subprocess.run([sys.executable, "-c", "import torch"], env=env, capture_output=True, check=False).returncode:
        pytest.skip("Python does not run under AddressSanitizer here")
    source = shutil.copytree(library.FOLDER, tmp_path / "source")
    if wide:
        shutil.copytree(HERE / "wide", source, dirs_exist_ok=True)
    made = tmp_path / "checked.so"
    subprocess.run([cxx, *CHECKED, "-o", str(made), *map(str, sorted(source.glob("*.cpp")))], check=True)
    half, tiles = wide or torch.bfloat16 in COMPILED.names, wide or COMPILED.tiles
    run = [sys.executable, str(HERE / "native_exercise.py"), str(made), *["tiles"] * tiles]
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "as in float64" + half * " in bfloat16" + tiles * " by tiles" + "\n"


LACKING = """
import resource, sys
import torch
from prefdistill.models.attention import blocks_of
from prefdistill.native import attention, library
from test_attention import places_of

torch.set_num_threads(8)
blocks = blocks_of(places_of([(3000, (40, 40))]))
q, k, v = (torch.randn(3080, n, 128, requires_grad=True) for n in (8, 2, 2))
compiled = library.library()
out = attention.attend(compiled, q, k, v, blocks, 0.1)  # threads have their stacks
kept = [x.new_empty(x.shape) for x in (q, k, v, q)]  # room for what PyTorch itself asks for
del kept
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
try:
    out.backward(torch.ones_like(out))
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
"""


@needs_kernel
def test_a_lack_of_memory_is_an_exception():
    said = []
    for megabytes in (16, 40, 120):
        run = [sys.executable, "-c", LACKING, str(megabytes)]
        done = subprocess.run(run, cwd=HERE, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.strip())
    assert "MemoryError" in said, said
