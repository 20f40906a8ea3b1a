import json
import os
import signal
from pathlib import Path

import pytest

from forks import Fork
from helpers import ROOT, fork_project, fork_two, run_isolated

SEEN = """
import importlib.util, json, os, sys
import datasets.config, random
from huggingface_hub import constants
from huggingface_hub.hf_api import api
from transformers.dynamic_module_utils import HF_MODULES_CACHE

print(json.dumps({
    "arguments": sys.argv[1:],
    "cwd": os.getcwd(),
    "name": __name__,
    "imported": sorted({"elm_ecg", "transformers_modules", "helpers", "pytest", "forks"} & sys.modules.keys()),
    "project": importlib.util.find_spec("elm_ecg") is not None,
    "variable": os.environ.get("VARIABLE"),
    "cache": [constants.HF_HUB_CACHE, HF_MODULES_CACHE, str(datasets.config.HF_DATASETS_CACHE)],
    "hub": [constants.ENDPOINT, api.endpoint, datasets.config.HF_ENDPOINT, constants.HF_HUB_OFFLINE],
    "random": random.random(),
}))
"""


def seen(tmp_path: Path, project: bool, *arguments: str, **environment: str) -> dict:
    variables = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), **environment}
    ended = Fork(SEEN, *arguments, cwd=tmp_path, environment=variables, project=project).finish()
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_a_fork_is_as_a_fresh_process(tmp_path):
    first = seen(tmp_path, False, "a", "b c", VARIABLE="1", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert first.pop("random") != seen(tmp_path, False)["random"]
    assert first == {
        "arguments": ["a", "b c"],
        "cwd": str(tmp_path),
        "name": "__main__",
        "imported": [],
        "project": False,
        "variable": "1",
        "cache": [str(tmp_path / "hf" / name) for name in ("hub", "modules", "datasets")],
        "hub": ["http://127.0.0.1:9"] * 3 + [False],
    }
    second = seen(tmp_path, True, HF_HUB_OFFLINE="1")
    assert (second["project"], second["imported"], second["variable"], second["hub"][3]) == (True, [], None, True)


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("import sys\nsys.exit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError"),
        (f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})", -signal.SIGKILL, ""),
    ],
)
def test_its_end(code, status, error):
    ended = fork_project(code).finish()
    assert ended.returncode == status
    assert error in ended.stderr


def test_an_error_of_an_isolated_process(tmp_path):
    with pytest.raises(RuntimeError, match=r"the isolated process ended with 1:\n(?s:.*)ModuleNotFoundError.*elm_ecg"):
        run_isolated("import elm_ecg", tmp_path)


def test_started_anew_it_does_not_find_the_project_either(tmp_path):
    assert (
        run_isolated("import importlib.util\nprint(importlib.util.find_spec('elm_ecg'))", tmp_path, anew=True)
        == "None\n"
    )


def test_two_at_once():
    code = "import os, torch.distributed as d\nd.init_process_group('gloo')\nd.barrier()\nprint(os.environ['RANK'], os.getcwd())"
    assert [process.finish().stdout for process in fork_two(code)] == [f"{rank} {ROOT}\n" for rank in "01"]
