import json
import re

import numpy as np
import pytest

from elm_ecg.training.data.sources import Records
from elm_ecg.training.evaluation.benchmarks.chats import SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.ecg_grounding import ECGGrounding, leads_in
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces

NOWHERE = RecordPlaces(Records({}), {})
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


@pytest.mark.parametrize(
    ("text", "leads"),
    [
        ("ST elevation in leads II, III and aVF.", "ii iii avf"),
        ("Lead I and V1-V3", "i v1 v2 v3"),
        ("V2 to V4, lead aVL", "v2 v3 v4 avl"),
        ("I think that grade II is shown", ""),
        ("leads V1, V2; in lead III none", "v1 v2 iii"),
        ("", ""),
    ],
)
def test_leads(text, leads):
    assert leads_in(text) == {*leads.split()}


def script(rights: list[list[str]], texts: list[list[str]]) -> dict[str, float]:
    """The scores of lists of leads, written anew."""
    pairs = list(zip(map(set, rights), map(set, texts), strict=True))
    f1 = [2 * len(a & b) / (len(a) + len(b)) for a, b in pairs if a]
    return {"lead_f1": float(np.mean(f1)), "lead_coverage": float(np.mean([len(b) / 12 for _, b in pairs]))}


def test_scores_are_those_of_an_independent_script():
    rng = np.random.default_rng(0)
    rights, texts = (
        [[str(name) for name in rng.permutation(LEADS)[: rng.integers(0, 7)]] for _ in range(80)] for _ in range(2)
    )

    def said(names: list[str]) -> str:
        return f"Changes in leads {', '.join(names)}." if names else "No changes."

    turns = [Turn("Interpret.", said(names), "interpretation") for names in rights]
    points = ECGGrounding().points(turns, range(80), [said(names) for names in texts])
    expected = script(rights, texts)
    for name, value in expected.items():
        assert points[name][:, 0].sum() / points[name][:, 1].sum() == pytest.approx(value)
    best = ECGGrounding().points(turns, range(80), [turn.answer for turn in turns])
    assert best["word_f1"][:, 0].min() == 1
    assert best["lead_f1"][:, 0].sum() == best["lead_f1"][:, 1].sum() == sum(map(bool, rights))


def test_files(tmp_path):
    talk = [{"from": "human", "value": "<image>\nInterpret the ECG."}, {"from": "gpt", "value": "Sinus rhythm."}]
    rows = [{"id": "1", "ecg": "ecg_ptbxl_benchmarking/data/ptbxl/records500/00000/00001_hr", "conversations": talk}]
    (tmp_path / "ecg-grounding-test.json").write_text(json.dumps(rows))
    (chat,) = ECGGrounding().chats(tmp_path, NOWHERE, SuiteOptions())
    assert chat.records == (rows[0]["ecg"],)
    assert chat.turns == (Turn("Interpret the ECG.", "Sinus rhythm.", "interpretation"),)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=re.escape("give the folder of ecg-grounding-test.json")):
        list(ECGGrounding().chats(tmp_path / "none", NOWHERE, SuiteOptions()))
