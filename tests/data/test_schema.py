import numpy as np

from elm_ecg.training.data.schema import as_list


def test_as_list():
    assert as_list([1, 2]) == as_list((1, 2)) == as_list(np.array([1, 2])) == [1, 2]
    assert as_list("ab") == ["ab"]
    assert as_list(None) == [None]
