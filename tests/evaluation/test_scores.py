import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from elm_ecg.training.evaluation import bootstrap as bootstrap_module
from elm_ecg.training.evaluation.questions import Question
from elm_ecg.training.evaluation.scores import METRIC_NAMES, Scorer, check_contract, closed_types, load_metrics, part_of
from elm_ecg.training.evaluation.verdict import verdict
from forks import ROOT
from intervals import bootstrap, paired_difference


def question(answer: str, kind: str = "rate", patient: str = "p") -> Question:
    return Question(0, 1, "?", answer, kind, patient)


@pytest.fixture(scope="module")
def modules():
    return load_metrics(["exact_match", "token_f1", "closed_set"])


def values(rows: dict, metric: str = "exact_match") -> dict:
    return {name: row["metrics"][metric]["value"] for name, row in rows.items()}


def test_summary_by_hand(modules, monkeypatch):
    monkeypatch.setattr(bootstrap_module, "MIN_PATIENTS", 2)
    questions = [question("yes", "a", "1"), question("no", "a", "2"), question("7", "b", "3"), question("9", "b", "3")]
    answers = {"ecg": ["yes", "no", "8", "x"], "zeroed": ["yes", "", "", "y"], "left_out": ["", "", "7", "z"]}
    summary = Scorer(questions, modules, 100, 0).summarise(answers)
    assert (summary["num_questions"], summary["num_patients"]) == (4, 3)
    assert summary["questions_by_type"] == {"a": 2, "b": 2}
    assert values(summary["conditions"]) == {"ecg": 0.5, "zeroed": 0.25, "left_out": 0.25}
    of_types = summary["conditions"]["ecg"]["by_question_type"]
    assert {kind: row["exact_match"]["value"] for kind, row in of_types.items()} == {"a": 1.0, "b": 0.0}
    assert set(summary["ecg_minus"]) == {"zeroed", "left_out"}
    lost = summary["ecg_minus"]["left_out"]["exact_match"]
    low, high = lost["interval_95"]
    assert lost["difference"] == 0.25
    assert low <= 0.25 <= high
    json.dumps(summary, allow_nan=False)


def test_an_empty_answer_is_wrong(modules):
    answers = {"ecg": ["yes", ""], "left_out": ["", ""]}
    summary = Scorer([question("yes"), question("no")], modules, 10, 0).summarise(answers)
    for metric in ("exact_match", "token_f1"):
        assert values(summary["conditions"], metric) == {"ecg": 0.5, "left_out": 0}


def test_intervals_are_those_of_the_bootstrap(modules):
    """All scores of a condition are resampled in one pass; each is what the bootstrap gives of it alone."""
    rng = np.random.default_rng(0)
    questions = [
        question(str(rng.choice(["yes", "no", "maybe"])), str(rng.choice(["a", "b"])), f"p{rng.integers(12)}")
        for _ in range(80)
    ]
    answers = {name: [str(rng.choice(["yes", "no", "", "other"])) for _ in questions] for name in ("ecg", "zeroed")}
    summary = Scorer(questions, modules, 200, 3).summarise(answers)
    patients = [q.patient_id for q in questions]
    right = {
        name: np.array([g == q.answer for g, q in zip(texts, questions, strict=True)], dtype=float)
        for name, texts in answers.items()
    }
    for name in answers:
        expected = bootstrap(right[name], patients, num_resamples=200, seed=3).to_dict()
        assert summary["conditions"][name]["metrics"]["exact_match"] == expected
    expected = paired_difference(right["ecg"], right["zeroed"], patients, num_resamples=200, seed=3).to_dict()
    assert summary["ecg_minus"]["zeroed"]["exact_match"] == expected

    closed = summary["conditions"]["ecg"]["by_question_type"]["a"]["closed_set"]
    rows = [i for i, q in enumerate(questions) if q.question_type == "a"]
    recalls = []
    for label in closed["labels"]:
        of_label = [i for i in rows if questions[i].answer == label]
        recalls.append(np.mean([answers["ecg"][i] == label for i in of_label]))
        assert closed["per_class"][label]["recall"] == pytest.approx(recalls[-1])
    assert closed["balanced_accuracy"]["value"] == pytest.approx(np.mean(recalls))
    low, high = closed["balanced_accuracy"]["interval_95"]
    assert low < np.mean(recalls) < high
    assert np.sum(closed["confusion_matrix"]) == len(rows)
    both = [summary["conditions"]["ecg"]["by_question_type"][k]["closed_set"]["macro_f1"]["value"] for k in "ab"]
    assert summary["conditions"]["ecg"]["metrics"]["closed_set"]["macro_f1"]["value"] == pytest.approx(np.mean(both))


def test_closed_types():
    questions = [question(answer, "a") for answer in ("yes", "no", "Yes", "no")]
    questions += [question(str(number), "b") for number in range(9)] + [question("sinus", "c")] * 5
    assert closed_types(questions) == ["a"]


def test_closed_types_tell_labels_apart_as_closed_set_does(modules):
    """ "AF", "AF." and "af " are one label: a type of four of these would be closed by one class alone, or by three."""
    questions = [question(answer, "a") for answer in ("AF", "AF.", "af ", "\N{FULLWIDTH LATIN CAPITAL LETTER A}F")]
    assert closed_types(questions) == []
    questions += [question(answer, "a") for answer in ("Sinus  rhythm", "sinus rhythm.")]
    assert closed_types(questions) == ["a"]
    summary = Scorer(questions, modules, 10, 0).summarise({"ecg": [q.answer for q in questions]})
    row = summary["conditions"]["ecg"]["by_question_type"]["a"]["closed_set"]
    assert row["labels"] == ["af", "sinus rhythm"]
    assert row["value"] == 1


def test_bleu_is_of_the_corpus():
    modules = load_metrics(["bleu4"])
    questions = [question("a b c d e", "a", "1"), question("e f g h", "b", "2"), question("b c d e", "b", "3")]
    texts = ["a b c d x", "e f g h", "b"]
    found = Scorer(questions, modules, 50, 0).summarise({"ecg": texts})
    expected = modules["bleu4"].compute(predictions=texts, references=[q.answer for q in questions])["bleu4"]
    assert found["conditions"]["ecg"]["metrics"]["bleu4"]["value"] == pytest.approx(expected)


def test_statements_missed_and_extra():
    questions = [question("af; lbbb", patient="1"), question("af", patient="2"), question("none", patient="3")]
    texts = ["lbbb", "", "none; pvc"]
    found = Scorer(questions, load_metrics(["set_f1"]), 10, 0).summarise({"ecg": texts})
    row = found["conditions"]["ecg"]["metrics"]["set_f1"]
    assert row["value"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert (row["missed"], row["extra"]) == ({"af": 2}, {"pvc": 1})
    assert (row["precision"], row["recall"]) == pytest.approx((0.5, 0.5))


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Of the ranks, Mann and Whitney's U."""
    ranks = rankdata(scores)
    positives = labels.sum()
    return (ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))


def test_auroc_of_likelihoods(modules):
    rng = np.random.default_rng(0)
    kinds = ["a"] * 40 + ["b"] * 60
    of_kind = {"a": ["no", "yes"], "b": ["left", "normal", "right"]}
    questions = [question(str(rng.choice(of_kind[k])), k, f"p{rng.integers(30)}") for k in kinds]
    candidates = [of_kind[q.question_type] for q in questions]
    logs = [
        [float(value) + 2 * (name == q.answer) for name, value in zip(names, rng.normal(size=len(names)), strict=True)]
        for q, names in zip(questions, candidates, strict=True)
    ]
    answers = [names[int(np.argmax(row))] for names, row in zip(candidates, logs, strict=True)]
    summary = Scorer(questions, modules, 100, 0, candidates=candidates).summarise({"ecg": answers}, {"ecg": logs})
    assert summary["metrics"]["auroc"]["title"] == "AUROC"
    expected = {}
    for kind, names in of_kind.items():
        rows = [i for i, k in enumerate(kinds) if k == kind]
        shares = np.array([np.exp(logs[i]) / np.exp(logs[i]).sum() for i in rows])
        labels = np.array([[questions[i].answer == name for name in names] for i in rows])
        expected[kind] = np.mean([auroc(shares[:, j], labels[:, j]) for j in range(len(names))])
    row = summary["conditions"]["ecg"]
    assert {kind: row["by_question_type"][kind]["auroc"]["value"] for kind in expected} == pytest.approx(expected)
    assert row["metrics"]["auroc"]["value"] == pytest.approx(np.mean(list(expected.values())))
    low, high = row["metrics"]["auroc"]["interval_95"]
    assert low < row["metrics"]["auroc"]["value"] < high


def test_one_answer_to_all_and_what_its_likelihoods_know(modules):
    """Exact match is that of a model without ECG, 50.9%; the AUROC is far better with the ECG than with another's."""
    questions = [question("yes" if index < 29 else "no", "a", str(index)) for index in range(57)]
    noise = np.random.default_rng(0).normal(size=(2, 57))
    odds = {"ecg": noise[0] + [2 * (q.answer == "yes") for q in questions], "swapped": noise[1]}
    logs = {name: [[0.0, float(value) + 9] for value in row] for name, row in odds.items()}
    scorer = Scorer(questions, modules, 100, 0, candidates=[["no", "yes"]] * 57)
    results = scorer.summarise(dict.fromkeys(odds, ["yes"] * 57), logs)
    assert values(results["conditions"]) == dict.fromkeys(odds, pytest.approx(0.509, abs=1e-3))
    assert results["conditions"]["ecg"]["one_answer"]
    assert "gives one answer to each question" in verdict(results | {"main_metric": "exact_match"})
    assert "by AUROC, the model looks at the ECG" in verdict(results | {"main_metric": "auroc"})


def test_rounding_errors_do_not_rank(modules):
    """Equal inputs get log-likelihoods that differ by batch; that is no knowledge of the answer."""
    questions = [question("yes" if index % 2 else "no", "a", str(index)) for index in range(20)]
    logs = [[-1.0 - 1e-6 * (index % 2), -0.5] for index in range(20)]
    scorer = Scorer(questions, modules, 10, 0, candidates=[["no", "yes"]] * 20)
    found = scorer.summarise({"ecg": ["yes"] * 20}, {"ecg": logs})
    assert found["conditions"]["ecg"]["metrics"]["auroc"]["value"] == 0.5


def test_auroc_of_one_answer_alone_is_not_there(modules):
    questions = [question("yes", "a", str(index)) for index in range(4)]
    logs = [[-1.0, -2.0]] * 4
    scorer = Scorer(questions, modules, 10, 0, candidates=[["no", "yes"]] * 4)
    assert "auroc" not in scorer.summarise({"ecg": ["no"] * 4}, {"ecg": logs})["conditions"]["ecg"]["metrics"]


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("<think>wide QRS</think><answer>LBBB</answer>", "wide QRS", "LBBB"),
        ("<think> a\nb </think>\n LBBB ", "a\nb", "LBBB"),
        ("LBBB", "", "LBBB"),
        ("<think>never ends", "never ends", "<think>never ends"),
        ("<answer>cut", "", "cut"),
        ("", "", ""),
    ],
)
def test_parts(text, think, answer):
    assert (part_of(text, "think"), part_of(text, "answer")) == (think, answer)


def test_parts_are_scored_apart(modules):
    questions = [
        question("<think>p waves absent</think><answer>AF</answer>", patient="1"),
        question("sinus", patient="2"),
    ]
    answers = ["<think>p waves seen</think><answer>AF</answer>", "sinus"]
    summary = Scorer(questions, modules, 10, 0).summarise({"ecg": answers})
    row = summary["conditions"]["ecg"]
    assert row["metrics"]["exact_match"]["value"] == 0.5
    assert row["parts"]["answer"]["exact_match"]["value"] == 1
    assert row["parts"]["think"]["exact_match"]["value"] == 0
    assert row["parts"]["think"]["token_f1"]["value"] == pytest.approx(2 / 3)


OWN = """
\"\"\"How many beats a minute an answer is off.\"\"\"

from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.evaluation.text import PairMetric


class RateError(PairMetric):
    \"\"\"Of each pair.\"\"\"

    scale = MetricScale(title="error of the rate", unit="bpm", high=None, higher_is_better=False)

    def _score(self, prediction, reference):
        return abs(float(prediction or 0) - float(reference))
"""


def own_metric(folder: Path, text: str = OWN, name: str = "rate_error") -> str:
    path = folder / f"{name}.py"
    path.write_text(text)
    return str(path)


def test_a_metric_of_ones_own(tmp_path):
    """By the path of its file, or of its folder; its numbers are in its units."""
    path = own_metric(tmp_path)
    (tmp_path / "rate_error").mkdir()
    own_metric(tmp_path / "rate_error")
    for place in (path, str(tmp_path / "rate_error")):
        modules = load_metrics([place])
        assert list(modules) == ["rate_error"]
        check_contract("rate_error", modules["rate_error"], ["60", "80"])
        questions = [question(str(60 + row), patient=str(row)) for row in range(10)]
        found = Scorer(questions, modules, 50, 0).summarise({"ecg": ["60"] * 10, "zeroed": ["50"] * 10})
        assert found["conditions"]["ecg"]["metrics"]["rate_error"]["value"] == 4.5
        assert found["ecg_minus"]["zeroed"]["rate_error"]["difference"] == -10
        scale = found["metrics"]["rate_error"]
        assert (scale["title"], scale["unit"], scale["higher_is_better"]) == ("error of the rate", "bpm", False)


def test_the_metric_of_the_documentation(tmp_path):
    """As a user copies it."""
    page = (ROOT / "docs" / "how_to" / "evaluate.md").read_text()
    (block,) = re.findall(r"```python\n(# rate_error\.py.*?)```", page, re.DOTALL)
    path = own_metric(tmp_path, block)
    module = load_metrics([path])["rate_error"]
    check_contract("rate_error", module, ["60", "80"])
    assert module.compute(predictions=["70", "fast"], references=["60", "80"])["samples"] == [10, 300]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("abs(", "-abs(", r"gives -70 on empty answers, outside the range 0.0 to None of its scale"),
        ("return abs", "return 1 / 0 or abs", "fails on the right answers: ZeroDivisionError"),
        ("prediction or 0", "prediction", "fails on empty answers: ValueError: could not convert string to float"),
        ("return abs", "return float('nan') or abs", "expected a finite number for each"),
        ("_score(self, prediction, reference)", "_compute(self, predictions, references)", "cannot be loaded"),
        ("    scale = ", "    scale = 100  # ", "does not say what its numbers mean; give its class a scale"),
        ("class RateError(PairMetric)", "class RateError", "cannot be loaded"),
        ("return abs", "return abs(", "cannot be loaded.*SyntaxError"),
    ],
)
def test_a_metric_that_is_none(tmp_path, before, after, message):
    path = own_metric(tmp_path, OWN.replace(before, after), name="bad")
    with pytest.raises(ValueError, match=message):
        check_contract("bad", load_metrics([path])["bad"], ["60", "80"])


def test_a_score_that_is_not_the_mean_of_its_samples(tmp_path):
    text = OWN.replace("PairMetric", "TextMetric").replace(
        "_score(self, prediction, reference)", "_compute(self, predictions, references)"
    )
    for result, message in (
        ('{"bad": 0.5, "samples": [0.0] * len(references)}', "gives 0.5 on the right answers, and its samples make 0"),
        ('{"bad": 0.5}', "expected a dict with bad and samples"),
        ('{"score": 0, "samples": [0.0]}', "expected a dict with bad and samples"),
        ('{"bad": 0, "samples": [0.0]}', r"samples of the shape \(1,\) for 2 pairs"),
        ('{"bad": 0, "samples": ["x", "y"]}', "are no numbers"),
    ):
        body = text.partition("        return")[0] + f"        return {result}\n"
        with pytest.raises(ValueError, match=message):
            check_contract("bad", load_metrics([own_metric(tmp_path, body, "bad")])["bad"], ["60", "80"])


def test_no_metric_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match=r"There is no metric \./nothing\.py: no file nothing\.py"):
        load_metrics(["./nothing.py"])
    with pytest.raises(ValueError, match="has the name of one of ours, exact_match; give its file another"):
        load_metrics([own_metric(tmp_path, name="exact_match")])


def test_unknown_metric():
    with pytest.raises(ValueError, match="There is no metric 'accuracy'; expected some of bert_score, bleu4"):
        load_metrics(["accuracy"])
    assert {"exact_match", "token_f1", "set_f1"} <= set(METRIC_NAMES)
