import re

from elm_ecg.training.evaluation.card import add_evaluations
from elm_ecg.training.evaluation.results import Results
from forks import ROOT
from helpers import RESULTS


def test_no_card_or_no_place_in_it(tmp_path):
    add_evaluations(tmp_path, "sha256:0")
    assert list(tmp_path.iterdir()) == []
    Results(RESULTS).save(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    add_evaluations(tmp_path, "sha256:0")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_the_documents_have_the_figures_of_the_quickstart_s_card():
    """And say of which seed and how many threads they are: with others they differ by a few points."""
    card = (ROOT / "model_cards" / "quickstart.md").read_text()
    value, low, high = map(float, re.search(r"\| ecg \| ([\d.]+) \[([\d.]+), ([\d.]+)\]", card).groups())
    others = [re.search(rf"\| {name} \| ([\d.]+)", card)[1] for name in ("zeroed", "noise", "swapped", "left_out")]
    zeroed, noise, swapped, left_out = (f"{float(value):.0f}%" for value in others)
    assert "seed 0, one thread" in card
    for name in ("README.md", "docs/explanations/results.md"):
        text = (ROOT / name).read_text()
        assert "seed 0, one thread" in text
        assert f"{value:.0f}% ({low:.0f}-{high:.0f}) are answered exactly" in " ".join(text.split())
        assert (
            f"{zeroed} with the ECG zeroed, {noise} with noise, {swapped} with another record's and {left_out} without it"
            in text
        )
