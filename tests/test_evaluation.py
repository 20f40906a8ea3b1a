import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import ROOT, TINY_VISION, free_port, save_tiny_data, save_tiny_llm, tiny_ecg_byte, tiny_sft
from hypothesis import given
from hypothesis import strategies as st

from modeling_elm import ELMForConditionalGeneration
from training import compare, evaluation, sft
from training.build import load_elm
from training.data import load_data
from training.evaluation import (
    CONDITIONS,
    EvaluationArguments,
    Question,
    answer_questions,
    bootstrap_interval,
    in_words,
    list_questions,
    most_frequent_answers,
    other_patients,
    summarise,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "data", train=8, test=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llm = save_tiny_llm(folder / "llm", "default")
    sft.main(tiny_sft(llm, data, folder / "elm", "--max_steps", "8", "--update", "encoder", "connector", "llm"))
    return folder / "elm"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model, data) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated") / "results"
    argv = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(folder)]
    return folder, evaluation.main([*argv, "--max_new_tokens", "6", "--batch_size", "3", "--num_resamples", "50"])


def question(answer: str, kind: str = "rate", patient: str = "p") -> Question:
    return Question(0, 1, "?", answer, kind, patient)


def test_questions_of_several_turns():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rate?"},
        {"role": "assistant", "content": " 80 "},
        {"role": "user", "content": "Rhythm?"},
        {"role": "assistant", "content": "sinus"},
    ]
    rows = [
        {"messages": turns, "patient_id": 0, "question_type": "rate"},
        {"messages": turns[1:3], "patient_id": None, "question_type": None},
        {"messages": turns[2:3], "patient_id": 7, "question_type": "axis"},
    ]
    assert list_questions(Dataset.from_list(rows)) == [
        Question(0, 2, "Rate?", "80", "rate", "0"),
        Question(0, 4, "Rhythm?", "sinus", "rate", "0"),
        Question(1, 1, "Rate?", "80", "all", "row 1"),
        Question(2, 0, "", "80", "axis", "7"),
    ]


def test_questions_of_parts_and_without_patients():
    content = [{"type": "ecg", "text": None}, {"type": "text", "text": "Is it?"}]
    answer = [{"type": "text", "text": "yes"}]
    rows = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}] * 2
    questions = list_questions(Dataset.from_list(rows))
    assert [(q.question, q.answer, q.patient_id) for q in questions] == [
        ("Is it?", "yes", "row 0"),
        ("Is it?", "yes", "row 1"),
    ]


@given(
    patients=st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=2).map(tuple), min_size=2, max_size=30),
    seed=st.integers(0, 5),
)
def test_other_patients(patients, seed):
    """Of one ECG or two each: none of the patients is the same."""
    if any(all(set(one) & set(other) for other in patients) for one in patients):
        with pytest.raises(ValueError, match="no other ECG to swap in"):
            other_patients(patients, seed)
        return
    others = other_patients(patients, seed)
    assert all(not set(patients[other]) & set(patient) for other, patient in zip(others, patients, strict=True))
    assert np.array_equal(others, other_patients(patients, seed))
    if len(set().union(*patients)) == sum(map(len, patients)):
        assert sorted(others) == list(range(len(patients)))  # each used once


def test_most_frequent_answers():
    def asked(words: str, answer: str, kind: str) -> Question:
        return Question(0, 1, words, answer, kind, "p")

    training = [asked("Rate?", rate, "rate") for rate in ("60", "80", "80")]
    training += [asked("Fast?", answer, "rate") for answer in ("yes", "yes", "no", "yes")]
    training += [asked("Axis?", axis, "axis") for axis in ("right", "left")]
    test = [asked("Rate?", "", "rate"), asked("Slow?", "", "rate"), asked("Axis?", "", "axis"), asked("ST?", "", "st")]
    assert most_frequent_answers(test, training) == ["80", "yes", "left", "yes"]


def test_bootstrap_against_a_loop():
    rng = np.random.default_rng(0)
    patients = [f"p{index}" for index in rng.integers(0, 12, size=60)]
    values = rng.random(60)
    names = sorted(set(patients))
    means = []
    loop = np.random.default_rng(1)
    for _ in range(4000):
        drawn = loop.choice(names, size=len(names))
        sample = [value for name in drawn for value, p in zip(values, patients, strict=True) if p == name]
        means.append(np.mean(sample))
    low, high = bootstrap_interval(values, patients, 4000, seed=2)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


def test_bootstrap_takes_patients_not_questions():
    values = np.repeat([0.0, 1.0] * 10, 50)
    alone = [f"row {index}" for index in range(1000)]
    together = [f"p{index // 50}" for index in range(1000)]
    narrow, wide = bootstrap_interval(values, alone), bootstrap_interval(values, together)
    assert wide[1] - wide[0] > 4 * (narrow[1] - narrow[0])
    assert bootstrap_interval(np.ones(5), list("abcde")) == (1.0, 1.0)


def test_bootstrap_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        patients = np.repeat(np.arange(40), 3)
        values = (rng.random(120) < np.repeat(rng.beta(3, 2, size=40), 3)).astype(float)
        low, high = bootstrap_interval(values, patients.astype(str).tolist(), 300, seed=trial)
        hits += low <= 0.6 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_summary_by_hand():
    questions = [question("yes", "a", "1"), question("no", "a", "2"), question("7", "b", "3"), question("", "b", "3")]
    answers = {"ecg": ["yes", "no", "8", "x"], "zeroed": ["yes", "", "", "y"], "left_out": ["", "", "7", "z"]}
    summary = summarise(questions, answers, 100, 0)
    assert (summary["num_questions"], summary["num_patients"]) == (4, 3)
    assert summary["questions_by_type"] == {"a": 2, "b": 2}
    scores = {name: row["exact_match"] for name, row in summary["conditions"].items()}
    assert scores == {"ecg": 0.5, "zeroed": 0.25, "left_out": 0.25}
    assert summary["conditions"]["ecg"]["by_question_type"] == {"a": 1.0, "b": 0.0}
    assert summary["ecg_minus"]["zeroed"]["difference"] == 0.25
    assert summary["ecg_minus"]["left_out"]["difference"] == 0.25
    low, high = summary["ecg_minus"]["left_out"]["interval_95"]
    assert low <= 0.25 <= high
    json.dumps(summary, allow_nan=False)


def test_an_empty_answer_is_wrong():
    summary = summarise([question("yes"), question("no")], {"ecg": ["yes", ""], "left_out": ["", ""]}, 10, 0)
    assert summary["conditions"]["ecg"]["exact_match"] == 0.5
    assert summary["conditions"]["left_out"]["exact_match"] == 0


def test_in_words():
    def words(lost: list[float]) -> str:
        row = {"difference": 0.2, "interval_95": lost}
        return in_words({"conditions": {"ecg": {"exact_match": 0.75}}, "ecg_minus": {"zeroed": row}})

    assert "75.0%" in words([0.1, 0.3])
    assert "the model looks at it" in words([0.1, 0.3])
    assert "may not look at it" in words([0.0, 0.3])


def test_files(evaluated, data):
    folder, results = evaluated
    assert {path.name for path in folder.iterdir()} == {
        "evaluation_results.json",
        "predictions.jsonl",
        "exact_match.png",
    }
    assert json.loads((folder / "evaluation_results.json").read_text()) == results
    questions = list_questions(load_data(EvaluationArguments(data=[str(data)]), "test"))
    assert results["num_questions"] == len(questions)
    assert results["num_patients"] == 7
    assert results["data"]["names"] == [data.name]
    assert results["data"]["split"] == "test"
    assert str(data.parent) not in json.dumps(results)
    assert set(results["conditions"]) == {*CONDITIONS, "most_frequent"}
    assert set(results["ecg_minus"]) == {*CONDITIONS, "most_frequent"} - {"ecg"}
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [(row["row"], row["turn"]) for row in predictions] == [(q.row, q.turn) for q in questions]
    right = [row["ecg"] == row["answer"] for row in predictions]
    assert np.mean(right) == results["conditions"]["ecg"]["exact_match"]
    assert (folder / "exact_match.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_evaluation_goes_on(evaluated, model, data, tmp_path, monkeypatch):
    """What was answered is not asked again, a line that was cut is, and the results are the same."""
    folder, results = evaluated
    argv = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(tmp_path)]
    argv += ["--max_new_tokens", "6", "--batch_size", "3", "--num_resamples", "50"]
    batches: list[str] = []
    answer = evaluation._answer

    def some(*args: Any) -> list[str]:
        if len(batches) == 8:
            raise KeyboardInterrupt
        batches.append(args[4])
        return answer(*args)

    monkeypatch.setattr(evaluation, "_answer", some)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(argv)
    (partial,) = tmp_path.iterdir()
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:-1]) + lines[-1][:20])
    asked = len(batches) - 1
    batches.clear()
    monkeypatch.setattr(evaluation, "_answer", lambda *args: batches.append(args[4]) or answer(*args))
    assert evaluation.main(argv) == results
    assert len(batches) == 4 * -(-results["num_questions"] // 3) - asked
    assert not partial.exists()
    assert (tmp_path / "predictions.jsonl").read_text() == (folder / "predictions.jsonl").read_text()


def test_answers_of_other_settings_are_not_taken(evaluated, model, data, tmp_path):
    (tmp_path / "predictions.partial.0.jsonl").write_text('another\n["ecg", 0, ["no", "no", "no"]]\n')
    argv = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(tmp_path)]
    assert (
        evaluation.main([*argv, "--max_new_tokens", "6", "--batch_size", "3", "--num_resamples", "50"]) == evaluated[1]
    )


def test_two_processes_that_were_killed_give_what_one_gives(evaluated, model, data, tmp_path):
    folder, results = evaluated
    argv = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(tmp_path)]
    argv += ["--max_new_tokens", "6", "--batch_size", "3", "--num_resamples", "50"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command = [*torchrun, "training/evaluation.py", *argv]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while sum(path.read_text().count("\n") for path in tmp_path.glob("predictions.partial.*")) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert json.loads((tmp_path / "evaluation_results.json").read_text()) == results
    assert (tmp_path / "predictions.jsonl").read_text() == (folder / "predictions.jsonl").read_text()


def test_results_go_to_the_model_by_default(model, data):
    options = ["--data", str(data), "--data_subset", "0.5", "--max_new_tokens", "2", "--num_resamples", "10"]
    results = evaluation.main(["--model_name_or_path", str(model), *options])
    assert results["num_patients"] == 4
    assert (model / "evaluation_results.json").is_file()
    assert "Not evaluated yet" not in (model / "README.md").read_text()


def answers_of(model: Path, data: Dataset, condition: str, **options: Any) -> list[str]:
    elm, processor = load_elm(str(model))
    args = EvaluationArguments(data=["none"], max_new_tokens=6, **options)
    return answer_questions(elm.eval(), processor, data, list_questions(data), condition, args)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_batch_answers_as_one_by_one(model, data, condition):
    rows = load_data(EvaluationArguments(data=[str(data)]), "test")
    together = answers_of(model, rows, condition, batch_size=7, system_prompt="Be brief.")
    assert together == answers_of(model, rows, condition, batch_size=1, system_prompt="Be brief.")
    assert all(isinstance(answer, str) for answer in together)


def test_rows_of_two_one_and_no_ecg(model, tmp_path):
    ecg = {"array": np.random.default_rng(0).normal(size=(12, 500)).tolist(), "sampling_rate": 100, "unit": "mV"}
    places = [{"type": "ecg"}, {"type": "ecg"}, {"type": "text", "text": "Same?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    two = {"messages": [{"role": "user", "content": places}, answer], "ecg": [ecg, ecg]}
    one = {"messages": [{"role": "user", "content": places[1:]}, answer], "ecg": [ecg]}
    none = {"messages": [{"role": "user", "content": places[2:]}, answer], "ecg": None}
    DatasetDict(test=Dataset.from_list([two, one, none, one, two, none])).save_to_disk(tmp_path)
    rows = load_data(EvaluationArguments(data=[str(tmp_path)]), "test")
    for condition in CONDITIONS:
        if condition != "left_out":  # there the chat has no place
            answers = answers_of(model, rows, condition)
            assert len(answers) == 6
    assert answers_of(model, rows, "left_out")[2] == answers_of(model, rows, "swapped")[2]
    with pytest.raises(ValueError, match="no other ECG to swap in"):
        answers_of(model, rows.select([0, 1, 2]), "swapped")
    assert answers_of(model, rows.select([2, 5]), "swapped") == answers_of(model, rows.select([2, 5]), "ecg")


def test_swapped_is_the_other_patients_ecg(model, data):
    rows = load_data(EvaluationArguments(data=[str(data)]), "test")
    others = other_patients([(patient,) for patient in rows["patient_id"]], 0)
    swapped = Dataset.from_list(
        [
            {**row, "ecg": rows.with_format(None)[int(other)]["ecg"]}
            for row, other in zip(rows.with_format(None), others, strict=True)
        ]
    )
    swapped = swapped.with_format("numpy", columns=["ecg"], output_all_columns=True)
    assert answers_of(model, swapped, "ecg") == answers_of(model, rows, "swapped")


def test_nothing_to_swap(model, data, tmp_path, caplog):
    """All else is scored where there is one patient alone; a type of question for the row counts for each answer."""
    row = load_data(EvaluationArguments(data=[str(data)]), "test").with_format(None)[0]
    DatasetDict(test=Dataset.from_list([{**row, "question_type": ["rhythm"]}])).save_to_disk(tmp_path / "data")
    argv = ["--model_name_or_path", str(model), "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
    results = evaluation.main([*argv, "--max_new_tokens", "2", "--num_resamples", "10"])
    assert set(results["conditions"]) == {"ecg", "zeroed", "left_out"}
    assert set(results["questions_by_type"]) == {"rhythm"}
    assert "ECGs are not swapped: All 1 rows have an ECG of the patients" in caplog.text


def test_compare(evaluated, model, data, tmp_path, capsys):
    """The results are what `elm compare` reads."""
    folder, _ = evaluated
    argv = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(tmp_path)]
    evaluation.main([*argv, "--max_new_tokens", "2", "--num_resamples", "10"])
    compare.main([str(folder / "evaluation_results.json"), str(tmp_path / "evaluation_results.json")])
    assert "| exact_match |" in capsys.readouterr().out


def test_metrics(model, data, tmp_path):
    argv = ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(tmp_path)]
    argv += ["--max_new_tokens", "3", "--num_resamples", "10"]
    results = evaluation.main([*argv, "--metrics", "token_f1", "exact_match", "closed_set"])
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for condition, row in results["conditions"].items():
        found = evaluate.load(str(evaluation.METRICS / "token_f1")).compute(
            predictions=[line[condition] for line in predictions], references=[line["answer"] for line in predictions]
        )
        assert row["metrics"]["token_f1"] == {"token_f1": found["token_f1"]}
        assert row["metrics"]["exact_match"] == {"exact_match": row["exact_match"]}
        assert np.sum(row["metrics"]["closed_set"]["confusion_matrix"]) == len(predictions)
    assert json.loads((tmp_path / "evaluation_results.json").read_text()) == results
    with pytest.raises(ValueError, match="name it with --bert_score_model"):
        evaluation.parse([*argv, "--metrics", "bert_score"])
    with pytest.raises(SystemExit):
        evaluation.parse([*argv, "--metrics", "accuracy"])


def test_text_only_model(tmp_path, data):
    llm = save_tiny_llm(tmp_path / "llm")
    sft.main(tiny_sft(llm, data, tmp_path / "elm", "--elm", "text", "--max_steps", "1", encoder=None))
    options = ["--data", str(data), "--max_new_tokens", "3", "--num_resamples", "10"]
    results = evaluation.main(["--model_name_or_path", str(tmp_path / "elm"), *options])
    assert all(results["ecg_minus"][name]["difference"] == 0 for name in ("zeroed", "swapped", "left_out"))


def test_symbolic_model(tmp_path, data):
    llm = save_tiny_llm(tmp_path / "llm")
    tiny_ecg_byte(across_leads=False).save_pretrained(tmp_path / "ecg_byte")
    options = ["--representation", "symbolic", "--ecg_tokenizer", str(tmp_path / "ecg_byte"), "--lead_names", "I", "V1"]
    sft.main(tiny_sft(llm, data, tmp_path / "elm", *options, "--max_steps", "8", encoder=None))
    rows = load_data(EvaluationArguments(data=[str(data)]), "test")
    zeros = [
        {**row, "ecg": {**row["ecg"], "array": np.zeros((12, 500)).tolist(), "unit": "mV"}}
        for row in rows.with_format(None)
    ]
    answers = {condition: answers_of(tmp_path / "elm", rows, condition) for condition in CONDITIONS}
    assert answers["zeroed"] == answers_of(tmp_path / "elm", Dataset.from_list(zeros), "ecg")
    assert len({tuple(texts) for texts in answers.values()}) == 4
    assert answers["ecg"] == answers_of(tmp_path / "elm", rows, "ecg", batch_size=1)


def test_model_of_drawings(tmp_path, data, monkeypatch):
    llm = save_tiny_llm(tmp_path / "llm")
    options = ["--representation", "rgb", "--encoder", "vit", "--encoder_config", json.dumps(TINY_VISION["vit"])]
    options += ["--num_ecg_tokens", "4", "--max_steps", "2"]
    sft.main(tiny_sft(llm, data, tmp_path / "elm", *options, encoder=None))
    rows = load_data(EvaluationArguments(data=[str(data)]), "test")
    shown: list[torch.Tensor | None] = []
    generate = ELMForConditionalGeneration.generate

    def watch(model, **inputs):
        shown.append(inputs.get("pixel_values"))
        return generate(model, **inputs)

    monkeypatch.setattr(ELMForConditionalGeneration, "generate", watch)
    answers = {condition: answers_of(tmp_path / "elm", rows, condition) for condition in CONDITIONS}
    ecg, zeroed, swapped, left_out = shown  # all questions are a batch
    assert left_out is None
    assert torch.equal(ecg.unique(dim=0), swapped.unique(dim=0))
    assert len(ecg.unique(dim=0)) == 7
    assert all(not torch.equal(own, other) for own, other in zip(ecg, swapped, strict=True))
    processor = load_elm(str(tmp_path / "elm"))[1]
    zeros = processor(ecgs=np.zeros((12, 500)), sampling_rate=100, return_tensors="pt")["pixel_values"]
    assert torch.equal(zeroed, zeros.expand_as(ecg))

    assert answers["ecg"] == answers_of(tmp_path / "elm", rows, "ecg", batch_size=1)
    options = ["--data", str(data), "--max_new_tokens", "6", "--num_resamples", "10"]
    evaluation.main(["--model_name_or_path", str(tmp_path / "elm"), *options])
    predictions = (tmp_path / "elm" / "predictions.jsonl").read_text().splitlines()
    for condition, texts in answers.items():
        assert [json.loads(row)[condition] for row in predictions] == texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "validation"], "has no split 'validation'"),
        (["--perturb", "noise"], "leave --perturb out"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--num_resamples", "-1"], "--num_resamples is -1"),
        (["--data_subset", "2"], "--data_subset is 2.0"),
    ],
)
def test_bad_input(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main(["--model_name_or_path", str(model), "--data", str(data), *options])


def test_bad_model(data, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json and no adapter_config\.json"):
        evaluation.main(["--model_name_or_path", str(tmp_path), "--data", str(data)])
    with pytest.raises(ValueError, match="Which model"):
        evaluation.main(["--data", str(data)])
