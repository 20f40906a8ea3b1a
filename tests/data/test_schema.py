import numpy as np
import pytest

from elm_ecg.training.data.schema import as_list, counted


@pytest.mark.parametrize(("number", "words"), [(0, "0 rows"), (1, "1 row"), (2000, "2,000 rows")])
def test_counted(number, words):
    assert counted(number, "row") == words


def test_as_list():
    assert as_list([1, 2]) == as_list((1, 2)) == as_list(np.array([1, 2])) == [1, 2]
    assert as_list("ab") == ["ab"]
    assert as_list(None) == [None]
