"""The Python API: names that are imported when they are first used."""

import pytest

import elm_ecg


@pytest.mark.parametrize("name", sorted(elm_ecg.__all__))
def test_name(name):
    assert getattr(elm_ecg, name).__name__ == name
    assert name in dir(elm_ecg)


def test_unknown_name():
    with pytest.raises(AttributeError, match="has no attribute 'read_egc'"):
        elm_ecg.read_egc  # noqa: B018
    assert elm_ecg.__version__.count(".") == 2


def test_completion_shows_the_api_alone():
    assert {name for name in dir(elm_ecg) if not name.startswith("__")} == set(elm_ecg.__all__)
