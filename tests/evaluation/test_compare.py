import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

from elm_ecg.training.evaluation import compare
from elm_ecg.training.evaluation.bootstrap import Difference, holm
from elm_ecg.training.evaluation.compare import in_words, main, read_model, score, told_apart
from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.evaluation.scores import METRICS
from helpers import RESULTS
from intervals import bootstrap, bootstrap_auroc, paired_auroc_difference, paired_difference


def make_questions(answers: list[str], patients: int = 10, **changes: Any) -> list[dict[str, Any]]:
    """A line for each answer that a model gave; the right one is "yes"."""
    return [
        {
            "row": row,
            "turn": 1,
            "record_id": f"record {row}",
            "patient_id": f"patient {row % patients}",
            "question_type": "verify",
            "question": "Is it?",
            "answer": "yes",
            "ecg": answer,
            "zeroed": "no",
            **changes,
        }
        for row, answer in enumerate(answers)
    ]


def save(folder: Path, questions: list[dict[str, Any]], model: str | None = None, **changes: Any) -> Path:
    """What `elm evaluate` writes, as far as it is read here."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    results = {
        **RESULTS,
        "model": model or folder.name,
        "data": {"names": ["my_data"], "split": "test", "fingerprint": "abc"},
        "num_questions": len(questions),
        "predictions_sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }
    path = folder / "evaluation_results.json"
    path.write_text(json.dumps({**results, **changes}))
    (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
    return path


def answers_of(chance: float, seed: int) -> list[str]:
    return np.where(np.random.default_rng(seed).random(60) < chance, "yes", "no").tolist()


ANSWERS = {"good": answers_of(0.9, 0), "poor": answers_of(0.3, 1), "also_poor": answers_of(0.3, 2)}


@pytest.fixture
def paths(tmp_path) -> list[str]:
    return [str(save(tmp_path / name, make_questions(answers))) for name, answers in ANSWERS.items()]


def test_three_models(paths, tmp_path, capsys):
    output = tmp_path / "compare.json"
    main([*paths, "--num_resamples", "500", "--seed", "3", "--output", str(output)])
    written = json.loads(output.read_text())
    assert (written["num_questions"], written["num_patients"]) == (60, 10)
    assert written["data"] == {"names": ["my_data"], "split": "test", "fingerprint": "abc"}
    assert written["settings"] == {
        "condition": "ecg",
        "num_resamples": 500,
        "seed": 3,
        "adjustment": "Holm, 3 comparisons",
    }
    assert str(tmp_path) not in output.read_text()

    patients = [f"patient {row % 10}" for row in range(60)]
    right = {name: np.array([answer == "yes" for answer in answers]) for name, answers in ANSWERS.items()}
    for name, scores in written["models"].items():
        expected = bootstrap(right[name], patients, None, 500, 3).to_dict()
        assert scores["exact_match"]["value"] == pytest.approx(expected["value"])
        assert scores["exact_match"]["interval_95"] == pytest.approx(expected["interval_95"])
    rows = written["comparisons"]
    assert [row["models"] for row in rows] == [["good", "poor"], ["good", "also_poor"], ["poor", "also_poor"]]
    for row in rows:
        first, second = row["models"]
        expected = paired_difference(right[first], right[second], patients, None, 500, 3).to_dict()
        assert row["difference"] == pytest.approx(expected["difference"])
        assert row["interval_95"] == pytest.approx(expected["interval_95"])
        assert row["p_value"] == pytest.approx(expected["p_value"])
    assert [row["adjusted_p_value"] for row in rows] == pytest.approx(holm([row["p_value"] for row in rows]))

    printed = capsys.readouterr().out
    gain = 100 * (right["good"].mean() - right["poor"].mean())
    assert "60 questions about 10 patients" in printed
    assert f"good is better than poor by {gain:.1f} points of exact match" in printed
    assert "- poor and also_poor: not shown to differ in exact match." in printed
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + 3 + 2 + 3
    assert {len(line) for line in tables[:5]} == {len(tables[0])}
    low, high = (100 * bound for bound in rows[0]["interval_95"])
    assert f"| +{gain:.1f} [{low:.1f}, {high:.1f}]" in tables[7]


def with_condition(folder: Path, questions: list[dict[str, Any]], **changes: Any) -> str:
    conditions = {**RESULTS["conditions"], "zeroed": RESULTS["conditions"]["left_out"]}
    return str(save(folder, questions, conditions=conditions, **changes))


def test_answers_in_another_condition(tmp_path, capsys):
    """The paired difference of what the models say without their ECG, whatever they say with it."""
    questions = {
        name: [{**row, "zeroed": answer} for row, answer in zip(make_questions(["yes"] * 60), answers, strict=True)]
        for name, answers in ANSWERS.items()
    }
    paths = [with_condition(tmp_path / name, rows) for name, rows in questions.items()]
    output = tmp_path / "out.json"
    main([*paths[:2], "--condition", "zeroed", "--num_resamples", "500", "--output", str(output)])
    written = json.loads(output.read_text())
    right = {name: np.array([answer == "yes" for answer in answers]) for name, answers in ANSWERS.items()}
    patients = [f"patient {row % 10}" for row in range(60)]
    expected = paired_difference(right["good"], right["poor"], patients, None, 500, 0).to_dict()
    (row,) = written["comparisons"]
    assert row["difference"] == pytest.approx(expected["difference"])
    assert row["interval_95"] == pytest.approx(expected["interval_95"])
    assert written["settings"]["condition"] == "zeroed"
    assert "Answers in the condition zeroed: every sample zero." in capsys.readouterr().out


def test_auroc_in_another_condition(tmp_path):
    """Of likelihoods that are all equal it is one half."""
    paths = [with_condition(tmp_path / str(seed), likelihoods(seed, skill=2.5)) for seed in (0, 1)]
    output = tmp_path / "out.json"
    main([*paths, "--metric", "auroc", "--condition", "zeroed", "--num_resamples", "50", "--output", str(output)])
    models = json.loads(output.read_text())["models"]
    assert [scores["auroc"]["value"] for scores in models.values()] == [0.5, 0.5]


def test_a_condition_that_was_not_evaluated(paths):
    with pytest.raises(ValueError, match=r"--condition noise: .* has ecg, .*evaluate with --conditions ecg noise"):
        main([*paths, "--condition", "noise"])


def test_scores_of_a_suite_are_of_answers_with_the_ecg(tmp_path, capsys):
    """Without it the models are compared by exact match."""
    questions = make_questions(ANSWERS["good"], suite={"accuracy": [1, 1]})
    paths = [with_condition(tmp_path / name, questions, suite={"name": "suite"}) for name in "ab"]
    main([*paths, "--condition", "zeroed", "--num_resamples", "50"])
    assert "not shown to differ in exact match" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"--metric accuracy is a score of the benchmark.*leave --condition zeroed out"
    ):
        main([*paths, "--condition", "zeroed", "--metric", "accuracy"])


def test_starts_at_once():
    """It has no use for libraries that take seconds to import."""
    code = "import sys, elm_ecg.training.evaluation.compare; print({'torch', 'datasets', 'evaluate'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_worse_may_come_first(paths, capsys):
    main([paths[1], paths[0], "--num_resamples", "200"])
    assert "- poor and good: good is better than poor by" in capsys.readouterr().out


def test_the_same_answers(paths, tmp_path, capsys):
    twins = [str(save(tmp_path / run / "good", make_questions(ANSWERS["good"]))) for run in ("a", "b/c")]
    main([*twins, paths[1], "--num_resamples", "100", "--output", str(tmp_path / "out.json")])
    row, *_ = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert (row["difference"], row["interval_95"], row["p_value"], row["adjusted_p_value"]) == (0, [0, 0], 1, 1)
    printed = capsys.readouterr().out
    assert "- good (a) and good (b/c): not shown to differ" in printed
    assert "- good (b/c) and poor: " in printed


@pytest.mark.parametrize(
    ("names", "paths", "apart"),
    [
        (["m", "n"], ["a/m/x", "a/n/x"], ["m", "n"]),
        (["m", "m", "n"], ["a/1/m/x", "a/2/m/x", "a/3/m/x"], ["m (1)", "m (2)", "n"]),
        (["m", "m"], ["m/x", "old/m/x"], ["m", "m (old)"]),
        (["m", "m"], ["m/m/x", "m/x"], ["m (m)", "m"]),
        (["m", "m"], ["m/evaluation/1/x", "m/evaluation/2/x"], ["m (1)", "m (2)"]),
        (["m", "m", "m"], ["a/1/b/x", "a/2/b/x", "c/x"], ["m (a/1/b)", "m (a/2/b)", "m (c)"]),
    ],
)
def test_models_of_one_name_are_told_apart_by_their_paths(names, paths, apart):
    assert told_apart(names, [Path(path) for path in paths]) == apart


def test_one_patient(tmp_path, capsys):
    a = save(tmp_path / "a|b", make_questions(["yes", "yes"], patients=1))
    b = save(tmp_path / "c", make_questions(["yes", "no"], patients=1))
    main([str(a), str(b), "--output", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert (row["difference"], row["interval_95"], row["p_value"], row["adjusted_p_value"]) == (0.5, None, None, None)
    printed = capsys.readouterr().out
    assert "nothing can be said of exact match: there are too few patients" in printed
    assert r"| a\|b  | 100.0 " in printed


def test_several_metrics(tmp_path, capsys):
    """By token F1 the second model is better, though neither is ever right."""
    a = save(tmp_path / "a", make_questions(["no"] * 20))
    b = save(tmp_path / "b", make_questions(["yes, sir"] * 20))
    argv = [str(a), str(b), "--metric", "token_f1", "exact_match", "token_f1", "--output", str(tmp_path / "out.json")]
    main(argv)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["models"]["b"]["token_f1"] == {
        "value": pytest.approx(2 / 3),
        "interval_95": pytest.approx([2 / 3] * 2),
    }
    rows = written["comparisons"]
    assert [row["metric"] for row in rows] == ["token_f1", "exact_match"]
    assert [row["difference"] for row in rows] == pytest.approx([-2 / 3, 0])
    assert [row["adjusted_p_value"] for row in rows] == pytest.approx([4 / 10_001, 1])
    words = "- a and b: b is better than a by 66.7 points of token f1; not shown to differ in exact match."
    assert words in capsys.readouterr().out


def test_exact_match_is_that_of_its_module():
    predictions, references = ["yes", "Yes", " yes\n", "", "no"], ["yes", "yes", "yes", "yes", "yes "]
    samples = evaluate.load(str(METRICS / "exact_match")).compute(predictions=predictions, references=references)[
        "samples"
    ]
    assert score("exact_match", predictions, references).tolist() == samples == [1, 0, 1, 0, 0]
    assert score("exact_match", [""], [""]).tolist() == [0]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("f2", "no metric 'f2'; expected one of .*exact_match.*token_f1"),
        ("../metrics", "no metric"),
        ("bleu4", "bleu4 is not a mean over the answers"),
        ("bert_score", "bert_score needs a model; compare by another metric"),
    ],
)
def test_other_metrics(metric, message):
    with pytest.raises(ValueError, match=message):
        score(metric, ["yes", "no"], ["yes", "yes"])


def test_a_metric_of_ones_own_goes_by_its_path(tmp_path):
    """The results know its name alone, by which nobody finds its file again."""
    questions = make_questions(next(iter(ANSWERS.values())))
    path = save(tmp_path, questions, metrics={**RESULTS["metrics"], "rate_error": {}})
    model = compare.read_model(path)
    with pytest.raises(ValueError, match=r"no metric 'rate_error'; expected .* or the path of one of your own"):
        compare.points_of("rate_error", model)


def test_words():
    def row(metric: str, value: float, p_value: float | None) -> compare.Comparison:
        return compare.Comparison(("a", "b"), metric, Difference(value, None, None, p_value), p_value)

    scales = {name: MetricScale(title=name.replace("_", " ")) for name in ("token_f1", "bleu")}
    scales["rate"] = MetricScale(title="error of the rate", unit="bpm", high=None, higher_is_better=False)
    assert in_words([row("token_f1", -0.123, 0.049), row("bleu", 0.5, 0.05)], scales) == (
        "a and b: b is better than a by 12.3 points of token f1; not shown to differ in bleu."
    )
    line = in_words([row("rate", -2.5, 0.01)], scales)  # an error: lower is better
    assert line == "a and b: a is better than b by 2.5 bpm of error of the rate."


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"data": {"split": "test", "fingerprint": "other"}}, "the fingerprint of the data is 'abc' and 'other'"),
        ({"data": {"split": "validation", "fingerprint": "abc"}}, "the split of the data is 'test' and 'validation'"),
    ],
)
def test_other_data(results, message, paths, tmp_path):
    other = save(tmp_path / "other", make_questions(ANSWERS["good"]), **results)
    with pytest.raises(ValueError, match=rf"good.*other.* are not about the same questions: {message}"):
        main([paths[0], str(other)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "Is it not?"}, "in line 1 of their predictions question is 'Is it.' and 'Is it not.'"),
        ({"answer": "no"}, "in line 1 of their predictions answer is 'yes' and 'no'"),
        ({"patient_id": "else"}, "in line 1 of their predictions patient_id is 'patient 0' and 'else'"),
    ],
)
def test_other_questions(change, message, paths, tmp_path):
    other = save(tmp_path / "other", make_questions(ANSWERS["good"], **change))
    with pytest.raises(ValueError, match=message):
        main([paths[0], str(other)])


def test_fewer_questions(paths, tmp_path):
    other = save(tmp_path / "other", make_questions(ANSWERS["good"][:50]))
    with pytest.raises(ValueError, match="they are 60 and 50"):
        main([paths[0], str(other)])


def test_every_model_is_compared_with_the_first(paths, tmp_path):
    other = save(tmp_path / "other", make_questions(ANSWERS["good"][:50]))
    with pytest.raises(ValueError, match=r"good.*other"):
        main([*paths, str(other)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "schema_version None.* expected 4"),
        ('{"schema_version": 1, "model": "old"}', "schema_version 1, .* expected 4. Write it anew"),
        (
            '{"schema_version": 4, "model": "m", "data": ["my_data"]}',
            "lacks model_revision, num_questions, .*, verdict, predictions_sha256, data.split, data.fingerprint",
        ),
    ],
)
def test_no_results(content, message, tmp_path):
    path = save(tmp_path / "model", make_questions(["yes"]))
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_model(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no predictions.jsonl beside"),
        ("", "holds 0 questions, and evaluation_results.json is about 1"),
        ("{}", "holds 0 questions"),  # cut off before the end of its line
        ("{\n", "Line 1 of .* is not JSON"),
        ('{"row": 0, "turn": 1}\n', "Line 1 of .* lacks record_id, patient_id, .*, ecg"),
    ],
)
def test_no_predictions(content, message, tmp_path):
    path = save(tmp_path / "model", make_questions(["yes"]))
    path.with_name("predictions.jsonl").unlink()
    if content is not None:
        path.with_name("predictions.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_model(path)


def test_answers_with_other_line_separators(tmp_path):
    path = save(tmp_path / "model", make_questions(["sinus\u2028rhythm\x85", "yes"]))
    assert [question["ecg"] for question in read_model(path).predictions] == ["sinus\u2028rhythm\x85", "yes"]


def test_two_patients_say_nothing(tmp_path, capsys):
    """Of two patients p would be the least that the resamples can show."""
    a = save(tmp_path / "a", make_questions(["yes"] * 20, patients=2))
    b = save(tmp_path / "b", make_questions(["no"] * 20, patients=2))
    main([str(a), str(b), "--output", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["p_value"] for row in written["comparisons"]] == [None]
    assert "about 2 patients: fewer than 10 do not show how patients differ" in written["warnings"][0]
    assert written["warnings"][0] in capsys.readouterr().out


def test_generated_and_chosen_answers_are_told_apart(paths, tmp_path, capsys):
    """Which of a few candidates is right is easier to say."""
    other = save(tmp_path / "other", make_questions(ANSWERS["good"]), settings={"score": "likelihood"})
    main([paths[0], str(other), "--num_resamples", "50"])
    assert "Some of these answers were generated and some chosen by likelihood" in capsys.readouterr().out
    main([*paths, "--num_resamples", "50"])
    assert "Some of these answers" not in capsys.readouterr().out


def test_p_at_the_floor_is_no_number(tmp_path, capsys):
    a, b = (save(tmp_path / answer, make_questions([answer] * 20)) for answer in ("yes", "no"))
    main([str(a), str(b), "--num_resamples", "2000"])
    assert capsys.readouterr().out.count("| < 0.001 ") == 2


def test_models_are_compared_by_the_evaluation_that_all_have(tmp_path, capsys):
    """Its folder has one name in both, whatever else they were evaluated on."""
    for name, answers in (("a", ANSWERS["good"]), ("b", ANSWERS["poor"])):
        save(tmp_path / name / "evaluation" / "my_data-test-generation-0", make_questions(answers), model=name)
    save(tmp_path / "a" / "evaluation" / "other", make_questions(["yes"]))
    models = [str(tmp_path / name) for name in "ab"]
    main([*models, "--num_resamples", "50"])
    assert "a is better than b by" in capsys.readouterr().out
    save(tmp_path / "b" / "evaluation" / "other", make_questions(["yes"]))
    with pytest.raises(
        ValueError, match=r"2 are of all these models; name the folder of one of each: .*/a/evaluation/my_data"
    ):
        main(models)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing holds no evaluation_results\.json"):
        main([models[0], str(tmp_path / "nothing")])


def test_folders(paths, capsys):
    main(paths)
    expected = capsys.readouterr().out
    main([str(Path(path).parent) for path in paths])
    assert capsys.readouterr().out == expected


def test_bad_arguments(paths, tmp_path):
    for files in (paths[:1], [paths[0], paths[0]]):
        with pytest.raises(ValueError, match="expected at least two, all different"):
            main(files)
    for output in ("compare.html", paths[0]):
        with pytest.raises(ValueError, match=r"--output is .*; expected a FILE.json that is none of those compared"):
            main([*paths, "--output", output])
    with pytest.raises(ValueError, match="there is no folder"):
        main([*paths, "--output", str(tmp_path / "nowhere" / "compare.json")])
    with pytest.raises(ValueError, match="--num_resamples is 0; it must be at least 1"):
        main([*paths, "--num_resamples", "0"])


def likelihoods(seed: int, skill: float, candidates: tuple[str, ...] = ("no", "yes")) -> list[dict[str, Any]]:
    """Questions decided by likelihood, the likelier right the larger the skill."""
    rng = np.random.default_rng(seed)
    answers = np.random.default_rng(9).choice(candidates, 60)
    questions = []
    for row, answer in enumerate(answers):
        logs = rng.normal(size=len(candidates)) + skill * (np.array(candidates) == answer)
        texts = {"ecg": candidates[int(logs.argmax())], "answer": str(answer), "candidates": list(candidates)}
        (question,) = make_questions(["yes"])
        names = {"row": row, "record_id": f"record {row}", "patient_id": f"patient {row % 20}"}
        questions.append(question | names | texts | {"log_likelihoods": {"ecg": logs.tolist(), "zeroed": [0.0] * 2}})
    return questions


def test_auroc(tmp_path, capsys):
    """As the paired difference of the same scores, and as `elm evaluate` has it for each model."""
    models = {name: likelihoods(seed, skill) for seed, (name, skill) in enumerate({"good": 2.5, "poor": 0.5}.items())}
    paths = [str(save(tmp_path / name, questions)) for name, questions in models.items()]
    output = tmp_path / "out.json"
    main([*paths, "--metric", "auroc", "exact_match", "--num_resamples", "500", "--output", str(output)])
    compared = json.loads(output.read_text())
    odds = [
        np.array([np.subtract(*question["log_likelihoods"]["ecg"][::-1]) for question in questions])
        for questions in models.values()
    ]
    labels = np.array([question["answer"] == "yes" for question in models["good"]])
    patients = [question["patient_id"] for question in models["good"]]
    expected = paired_auroc_difference(*odds, labels, patients, 500)
    row = compared["comparisons"][0]
    assert row["difference"] == pytest.approx(expected.value)
    assert row["interval_95"] == pytest.approx([expected.low, expected.high])
    assert row["p_value"] == pytest.approx(expected.p_value)
    for name, scores in zip(models, odds, strict=True):
        single = bootstrap_auroc(scores, labels, patients, 500)
        assert compared["models"][name]["auroc"]["value"] == pytest.approx(single.value)
        assert compared["models"][name]["auroc"]["interval_95"] == pytest.approx([single.low, single.high])
    assert "good is better than poor by" in capsys.readouterr().out


def test_auroc_of_too_few_patients(tmp_path, capsys):
    """One question has the other answer: its patient is in some resamples only, so there is an exact match and no AUROC."""
    paths = []
    for seed in (0, 1):
        questions = likelihoods(seed, skill=0)[:12]
        for place, question in enumerate(questions):
            question["answer"] = "yes" if place == 0 else "no"
        paths.append(str(save(tmp_path / str(seed), questions)))
    compare.main([*paths, "--metric", "exact_match", "auroc"])
    assert "nothing can be said of AUROC: there are too few patients" in capsys.readouterr().out


def test_auroc_needs_likelihoods(tmp_path):
    questions = likelihoods(0, 1.0)
    written = [{name: question[name] for name in question if name != "candidates"} for question in questions]
    paths = [str(save(tmp_path / "a", questions)), str(save(tmp_path / "b", written))]
    with pytest.raises(ValueError, match=r"b/evaluation_results\.json has no likelihoods, which auroc is made of"):
        main([*paths, "--metric", "auroc"])


def test_auroc_of_other_candidates_or_of_one_answer(tmp_path):
    questions = likelihoods(0, 1.0)
    other = [question | {"candidates": ["yes", "no"]} for question in questions]
    first = str(save(tmp_path / "a", questions))
    with pytest.raises(ValueError, match="decide among different candidates"):
        main([first, str(save(tmp_path / "b", other)), "--metric", "auroc"])
    alike = [question | {"answer": "yes"} for question in questions]
    paths = [str(save(tmp_path / name, alike)) for name in ("c", "d")]
    with pytest.raises(ValueError, match="has one right answer, so there is no AUROC"):
        main([*paths, "--metric", "auroc"])
