"""What several test files share: weights by the golden formula, and processes without the project."""

import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

# the project is installed editable: without its finder and its folder only what a saved folder holds can be imported
_HIDE_PROJECT = """
import importlib.util, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{{getattr(f, '__module__', '')}} {{f!r}}".lower()]
sys.path[:] = [p for p in sys.path if p not in ("", {root!r}) and "editable" not in p]
assert importlib.util.find_spec("configuration_elm") is None, "the project is still importable"
"""


def golden_state_dict(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The reference's weights, each made from its key by the formula in golden/README.md."""

    def fill(key: str, shape: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            return torch.zeros(shape)
        if key.endswith("running_var"):
            return 0.5 + torch.rand(shape, generator=generator)
        values = torch.randn(shape, generator=generator)
        if key.endswith("running_mean"):
            return 0.1 * values
        if len(shape) == 1 and key.endswith("weight"):
            return 1 + 0.1 * values
        if len(shape) <= 1:
            return 0.02 * values
        return values / math.sqrt(math.prod(shape[1:]))

    return {key: fill(key, shape) for key, shape in shapes.items()}


def run_isolated(code: str, cwd: str | Path) -> str:
    """Runs `code` in a fresh process that cannot import the project, and returns what it prints.

    `cwd` holds the process' Hugging Face caches too; a process that fails raises with its stderr.
    """
    caches = {"HF_HOME": str(Path(cwd) / "hf_home"), "HF_MODULES_CACHE": str(Path(cwd) / "hf_modules")}
    unset = ("PYTHONPATH", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.run(
        [sys.executable, "-c", _HIDE_PROJECT.format(root=str(ROOT)) + code],
        cwd=cwd,
        env=environment | caches | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"the isolated process ended with {process.returncode}:\n{process.stderr}")
    return process.stdout
