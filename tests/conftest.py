from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real recordings and golden numbers, which a public clone does not have."""
    if not SHARED.is_dir():
        pytest.skip(f"no real recordings and golden numbers at {SHARED}")
    return SHARED
