import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# two processes run tests at a time: more threads would only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
_bases = tempfile.TemporaryDirectory(prefix="elm-base-models-")  # of adapters, as long as the tests run
os.environ["ELM_BASE_MODELS"] = _bases.name

# the same command gives the same result; HYPOTHESIS_EXAMPLES=1000 looks further
settings.register_profile(
    "suite", max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")), derandomize=True, deadline=None
)
settings.load_profile("suite")

# what is imported stays: to look for garbage meanwhile is in vain
gc.disable()

SHARED = Path(__file__).resolve().parents[2] / "shared"
# those that take longest, first: a process that began one of them last would run on alone
LONG_FILES = ["sft", "evaluate", "rl", "push", "modeling_elm", "distributed", "answers", "lora", "families"]
LONG_FILES += ["modeling_ecg_pretraining", "convert"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real recordings and golden numbers, which a public clone does not have."""
    if not SHARED.is_dir():
        pytest.skip(f"no real recordings and golden numbers at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> Path:
    """The folder of a tiny language model, which nobody changes."""
    from helpers import save_tiny_llm  # late: it imports PyTorch, which reads OMP_NUM_THREADS

    return save_tiny_llm(tmp_path_factory.mktemp("llm") / "llm")


def pytest_collection_finish() -> None:
    """Once all is imported, what takes time for nothing in tests.

    The modules that all tests import stay to the end: no collection of garbage, of which each training has some, looks through
    them again. Nor does one come after every 700 new objects, or with each training for the sake of a GPU's memory."""
    from accelerate.utils import memory

    from forks import read_files_once

    read_files_once()
    memory.clear_device_cache = lambda garbage_collection=False: None
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_sessionfinish() -> None:
    """As usual at the end, where libraries look for what they have left."""
    gc.unfreeze()
