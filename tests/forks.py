"""Fresh processes that need not import torch and transformers anew: they fork from a template that has done so.

`python tests/forks.py` is the template. It reads requests, one JSON object a line, and forks for each. It never imports a
module of the project and has one thread, beside that of jemalloc, which knows of forks. What forks from it has its own folder,
arguments and environment, and finds the project only where it is asked to.
"""

import atexit
import gc
import importlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from functools import cache
from importlib.metadata import PathDistribution
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# a test that waits for ever tells nobody why
TIMEOUT = 600


class Fork:
    """Python code in a process forked from the template; `finish` waits for it.

    Args:
        code: as `python -c` takes it.
        arguments: `sys.argv[1:]`.
        cwd: its folder.
        environment: all of its environment variables.
        project: whether it finds the project, as processes of this environment do.
    """

    def __init__(self, code: str, *arguments: str, cwd: str | Path, environment: dict[str, str], project: bool = False):
        self._output = tempfile.TemporaryDirectory()
        request = {"code": code, "arguments": arguments, "cwd": str(cwd), "environment": environment}
        self.pid = _ask(**request, project=project, output=self._output.name)

    def finish(self) -> subprocess.CompletedProcess:
        """Its exit status (below zero: the signal that ended it), stdout and stderr."""
        status = _ask(wait=self.pid)
        texts = [(Path(self._output.name) / name).read_text("utf-8", "replace") for name in ("stdout", "stderr")]
        self._output.cleanup()
        return subprocess.CompletedProcess(f"fork {self.pid}", status, *texts)


def hide_project() -> list[Any]:
    """Takes the project, which is installed editable, from this process; returns the finders of `sys.meta_path` that found it."""
    finders = [f for f in sys.meta_path if "editable" in f"{getattr(f, '__module__', '')} {f!r}".lower()]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in finders]
    folders = {"", str(ROOT), str(ROOT / "tests")}
    sys.path[:] = [path for path in sys.path if path not in folders and "editable" not in path]
    assert importlib.util.find_spec("elm_ecg") is None, "the project is still importable"
    return finders


def read_files_once() -> None:
    """What a Python file imports, and what an installed package is, is read once.

    transformers reads the imports each time that a model is saved or loaded, those of our modules many times over, and accelerate
    the package's description dozens of times in each training.
    """
    from transformers import dynamic_module_utils

    for name in ("get_imports", "get_relative_imports"):
        setattr(dynamic_module_utils, name, _by_content(getattr(dynamic_module_utils, name)))
    parse = PathDistribution.metadata.fget
    described: dict[Path, Any] = {}

    def metadata(package: PathDistribution) -> Any:
        if package._path not in described:
            described[package._path] = parse(package)
        return described[package._path]

    PathDistribution.metadata = property(metadata)


def _by_content(read: Callable[[str | Path], list[str]]) -> Callable[[str | Path], list[str]]:
    known: dict[bytes, list[str]] = {}

    def imports(path: str | Path) -> list[str]:
        content = Path(path).read_bytes()
        if content not in known:
            known[content] = read(path)
        return list(known[content])

    return imports


@cache
def _template() -> subprocess.Popen:
    """The template of this process; it ends when nobody can ask any more."""
    command = [sys.executable, __file__]
    # of a thread of OpenMP nothing would be left after a fork
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(**request: Any) -> int:
    template = _template()
    assert template.stdin is not None
    assert template.stdout is not None
    template.stdin.write(json.dumps(request) + "\n")
    template.stdin.flush()
    reply = template.stdout.readline()
    assert reply, "the process from which those of the tests fork has ended; its error is on stderr"
    return json.loads(reply)


def _serve() -> None:
    """Answers a request for code with the number of the process that runs it, one to wait with its exit status."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    project = hide_project()
    gc.disable()
    _import_what_takes_seconds()
    gc.freeze()  # nothing of it is garbage, in no fork either
    gc.enable()
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False  # nor is there anything to clear up
    assert not {"elm_ecg", "training", "transformers_modules", "helpers"} & sys.modules.keys()
    sys.stdout.flush()
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif not (reply := os.fork()):
            sys.meta_path.extend(project if request["project"] else [])
            os._exit(_run(**request))
        print(reply, file=replies, flush=True)


def _run(code: str, arguments: list[str], cwd: str, environment: dict[str, str], project: bool, output: str) -> int:
    """Runs the code as `python -c` would, and returns the exit status."""
    signal.alarm(TIMEOUT)
    for number, path in enumerate((os.devnull, f"{output}/stdout", f"{output}/stderr")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    _read_environment_again()
    sys.argv[:] = ["-c", *arguments]
    sys.path[:0] = [""] if project else []
    main = sys.modules["__main__"] = ModuleType("__main__")
    status: Any = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status or 0)


def _import_what_takes_seconds() -> None:
    import captum.attr  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import scipy.io
    import scipy.signal  # noqa: F401
    import torch
    import transformers
    import trl
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # lazy modules: a name imports what it stands for
    for module, name in (
        (transformers, "AutoModelForCausalLM"),
        (transformers, "AutoModelForImageTextToText"),
        (transformers, "AutoProcessor"),
        (transformers, "AutoFeatureExtractor"),
        (transformers, "AutoImageProcessor"),
        (transformers, "BertModel"),
        (transformers, "CLIPModel"),
        (transformers, "LlamaForCausalLM"),
        (transformers, "Qwen2ForCausalLM"),
        (transformers, "SiglipModel"),
        (transformers, "Trainer"),
        (transformers, "pipeline"),
        (trl, "GRPOTrainer"),
        (trl, "SFTTrainer"),
    ):
        getattr(module, name)
    # compiles the regular expressions of all architectures, for `from_pretrained`
    get_checkpoint_conversion_mapping("llama")
    torch.set_num_threads(1)
    read_files_once()
    for path in ROOT.glob("*.py"):
        transformers.dynamic_module_utils.get_imports(path)
        transformers.dynamic_module_utils.get_relative_imports(path)


def _read_environment_again() -> None:
    """What libraries read or drew when they were imported is this process' own."""
    import datasets.config
    import huggingface_hub.constants
    import numpy as np
    import transformers.dynamic_module_utils
    from huggingface_hub import constants, hf_api

    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    hf_api.api.endpoint = constants.ENDPOINT
    modules = os.getenv("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))
    transformers.utils.hub.HF_MODULES_CACHE = transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
    random.seed()
    np.random.seed()  # noqa: NPY002


if __name__ == "__main__":
    _serve()
