from elm_ecg.training.evaluation.card import add_evaluation
from helpers import RESULTS


def test_no_card_or_no_place_in_it(tmp_path):
    add_evaluation(tmp_path, RESULTS)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "README.md").write_text("# Mine\n")
    add_evaluation(tmp_path, RESULTS)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
