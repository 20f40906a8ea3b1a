import csv
from json import loads

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from elm_ecg.training.data.sources import Records
from elm_ecg.training.evaluation.benchmarks.chats import Chat, SuiteOptions
from elm_ecg.training.evaluation.benchmarks.ptbxl import GROUPS, PTBXL, labels_of, question_of, read_statements
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces
from elm_ecg.training.evaluation.benchmarks.suite import SuiteScorer
from elm_ecg.training.evaluation.questions import Question
from helpers import write_rows


def places_in(folder) -> RecordPlaces:
    with (folder / "records.csv").open(newline="") as file:
        about = {row["ecg_id"]: row for row in csv.DictReader(file)}
    return RecordPlaces(Records(dict.fromkeys(about, "x")), about, [folder])


def script(chats: list[Chat], logs: np.ndarray) -> dict[str, float]:
    """Macro AUROC of each group of statements, by another library."""
    areas: dict[str, dict[str, float]] = {}
    kinds = np.array([chat.turns[0].question_type for chat in chats])
    has = np.array([chat.turns[0].answer == "yes" for chat in chats])
    shares = 1 / (1 + np.exp(logs[:, 0] - logs[:, 1]))
    for kind in np.unique(kinds):
        rows = kinds == kind
        areas.setdefault(kind.split()[0], {})[kind] = float(roc_auc_score(has[rows], shares[rows]))
    return {group: float(np.mean(list(of_group.values()))) for group, of_group in areas.items()}


def test_scores_are_those_of_an_independent_script(shared):
    folder = shared / "data" / "ptbxl"
    chats = list(PTBXL().chats(None, places_in(folder), SuiteOptions("test")))
    turns = [chat.turns[0] for chat in chats]
    rng = np.random.default_rng(0)
    logs = rng.normal(0, 1, (len(turns), 2)) + np.array([[0, turn.answer == "yes"] for turn in turns])
    questions = [
        Question(row, 1, turn.question, turn.answer, turn.question_type, chat.records[0], turn.question)
        for row, (turn, chat) in enumerate(zip(turns, chats, strict=True))
    ]
    choices = [list(turn.options) for turn in turns]
    scorer = SuiteScorer(questions, {}, 20, 0, {}, choices, suite=PTBXL(), turns=turns, chats=range(len(turns)))
    scores = scorer._auroc(logs.tolist())
    expected = script(chats, logs)
    assert expected.keys() == {*GROUPS}
    for group, value in expected.items():
        # log-odds are rounded, which may make ties
        assert scores[None, f"auroc_{group}", "value"][0] == pytest.approx(value, abs=1e-4)
        assert 0.6 < value < 0.9
        # in each resample the mean over the labels that some of its records have and some have not
        assert np.isfinite(scores[None, f"auroc_{group}", "value"][1]).all()
    every = [value for (kind, _, _), (value, _) in scores.items() if kind is not None]
    assert scores[None, "auroc", "value"][0] == pytest.approx(np.mean(every))
    assert scorer._scale("auroc_form").title == "macro AUROC, form"


def test_who_is_asked_what(shared):
    folder = shared / "data" / "ptbxl"
    places = places_in(folder)
    chats = list(PTBXL().chats(None, places, SuiteOptions("test")))
    assert {places.about[chat.records[0]]["strat_fold"] for chat in chats} == {"10"}
    asked = {(chat.records[0], chat.turns[0].question_type): chat.turns[0].answer for chat in chats}
    for (record, kind), answer in asked.items():
        group, name = kind.split()
        names = places.about[record][group].split()
        assert names  # a group is asked about the records that have a label of it
        assert answer == ("yes" if name in names else "no")
    assert sum(kind.startswith("superclass") for _, kind in asked) == 5 * len(
        {r for r, k in asked if k == "superclass MI"}
    )
    others = list(PTBXL().chats(None, places, SuiteOptions("validation")))
    assert {places.about[chat.records[0]]["strat_fold"] for chat in others} == {"9"}


def test_codes_and_columns_give_the_same_labels(shared):
    folder = shared / "data" / "ptbxl"
    statements = read_statements(folder / "scp_statements.csv")
    same = 0
    for row in places_in(folder).about.values():
        if row["scp_codes"]:
            of_codes = labels_of({"codes": [*loads(row["scp_codes"])]}, statements)
            of_columns = labels_of({group: row[group] for group in GROUPS}, statements)
            same += of_codes == of_columns
    assert same > 1000


def test_words(shared):
    statements = read_statements(shared / "data" / "ptbxl" / "scp_statements.csv")
    words = {name: question_of("subclass", name, statements) for name in ("LAFB/LPFB", "AVB", "ISCA", "NORM", "IMI")}
    assert words["LAFB/LPFB"] == "Does this ECG show left anterior fascicular block or left posterior fascicular block?"
    assert words["AVB"] == "Does this ECG show AV block?"
    assert words["NORM"] == question_of("superclass", "NORM", statements) == "Is this a normal ECG?"
    assert question_of("rhythm", "AFIB", statements) == "Does this ECG show atrial fibrillation?"
    every = {
        (group, name.strip("_"))
        for group in GROUPS
        for row in places_in(shared / "data" / "ptbxl").about.values()
        for name in row[group].split()
    }
    # no code stands where words should
    assert not [name for group, name in every if f"show {name}?" in question_of(group, name, statements)]


def test_faults(tmp_path):
    places = RecordPlaces(Records({"1": "x"}), {"1": {}}, [tmp_path])
    with pytest.raises(ValueError, match=r"--suite ptbxl needs scp_statements[.]csv of PTB-XL beside the --records"):
        list(PTBXL().chats(None, places, SuiteOptions()))
    write_rows(tmp_path / "scp_statements.csv", {"": "NORM", "description": "normal ECG"})
    with pytest.raises(ValueError, match="lacks the columns 'diagnostic', 'form'"):
        list(PTBXL().chats(None, places, SuiteOptions()))
    columns = ("", "description", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")
    write_rows(tmp_path / "scp_statements.csv", dict.fromkeys(columns, ""))
    with pytest.raises(ValueError, match="no record of the split 'test' has labels"):
        list(PTBXL().chats(None, places, SuiteOptions()))
