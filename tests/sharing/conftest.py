import json

import pytest


@pytest.fixture(scope="session")
def shapes(shared):
    """Reference key -> shape of each encoder and connector."""
    folder = shared / "golden"
    files = ("encoder_state_dicts.json", "connector_state_dicts.json")
    return {kind: keys for name in files for kind, keys in json.loads((folder / name).read_text()).items()}
