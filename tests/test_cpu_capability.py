"""The tests that rounding could move, under the vector instructions of another processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Trainings with thresholds, and outputs compared between passes of different sizes.
FILES = (
    "methods/decoding/test_lud.py",
    "methods/weights/test_bitnet.py",
    "methods/weights/test_sparsegpt.py",
    "speculative/test_greedy.py",
    "trainer/test_loop.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_thresholds_hold_on_another_processor(capability: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    if capability == "avx2":
        environment["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-m", "not slow"]
    files = [f"tests/{name}" for name in FILES]
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
