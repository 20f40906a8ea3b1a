import json
import os
import re
import shutil
import signal
import time
from copy import copy
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from scipy.stats import t as student_t

from elm_ecg.ecg_utils import as_record, with_notices
from elm_ecg.training import sft
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.digest import digest_of_folder
from elm_ecg.training.evaluation import arguments, compare, report
from elm_ecg.training.evaluation import evaluate as evaluation
from elm_ecg.training.evaluation import results as results_module
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.arguments import EvaluationArguments
from elm_ecg.training.evaluation.bootstrap import p_in_words
from elm_ecg.training.evaluation.conditions import ASKED, CONDITIONS, Condition
from elm_ecg.training.evaluation.questions import fingerprint_of, list_questions
from elm_ecg.training.evaluation.report import write_report
from elm_ecg.training.evaluation.runs import over_runs
from elm_ecg.training.evaluation.scores import METRICS
from elm_ecg.training.figures import scores_plot
from elm_ecg.training.load import load_elm
from helpers import fork_two, save_record, save_tiny_data, save_tiny_llm, tiny_sft

SETTINGS = ["--max_new_tokens", "3", "--batch_size", "5", "--num_resamples", "50"]


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Of a report, where no test looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PICTURE_WIDTH", 300)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "data", train=8, test=10)


@pytest.fixture(scope="module")
def model(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llm = save_tiny_llm(folder / "llm", "default")
    sft.main(tiny_sft(llm, data, folder / "elm", "--max_steps", "8", "--update", "encoder", "connector", "llm"))
    return folder / "elm"


@pytest.fixture(scope="module")
def elm(model) -> tuple[Any, Any]:
    return load_elm(str(model))


def argv_of(model: Path, data: Path, folder: Path, *options: str) -> list[str]:
    return ["--model_name_or_path", str(model), "--data", str(data), "--output_dir", str(folder), *options]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model, data) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated") / "results"
    return folder, evaluation.main(argv_of(model, data, folder, *SETTINGS))


def predictions_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().split("\n")[:-1]]


@pytest.fixture
def no_report(monkeypatch):
    """Reports are written by `test_files` and others; here they would take longest."""
    monkeypatch.setattr(evaluation, "write_report", lambda *args, **options: None)


def test_files(evaluated, data, model):
    folder, results = evaluated
    names = {"evaluation_results.json", "predictions.jsonl", "report.html"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "evaluation_results.json").read_text()) == results
    questions = list_questions(load_data(EvaluationArguments(data=[str(data)]), "test"))
    assert results["num_questions"] == len(questions)
    assert results["num_patients"] == 10
    assert results["data"]["names"] == [data.name]
    assert results["data"]["split"] == "test"
    assert results["model_revision"] == digest_of_folder(model)
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(results["model_files"])
    assert results["evaluation"].startswith("data-test-generation-")
    assert {"torch", "transformers"} <= set(results["packages"])
    assert str(data.parent) not in json.dumps(results)
    assert set(results["conditions"]) == set(CONDITIONS)
    assert set(results["ecg_minus"]) == set(CONDITIONS) - {"ecg"}
    predictions = predictions_in(folder)
    assert [(row["row"], row["turn"]) for row in predictions] == [(q.row, q.turn) for q in questions]
    right = [row["ecg"] == row["answer"] for row in predictions]
    assert np.mean(right) == results["conditions"]["ecg"]["metrics"]["exact_match"]["value"]
    for condition, row in results["conditions"].items():
        found = evaluate.load(str(METRICS / "token_f1")).compute(
            predictions=[line[condition] for line in predictions], references=[line["answer"] for line in predictions]
        )
        assert row["metrics"]["token_f1"]["value"] == pytest.approx(found["token_f1"])


@pytest.mark.slow
def test_in_memory_as_the_command(evaluated, elm, data):
    folder, results = evaluated
    splits = load_from_disk(data)
    options = {"max_new_tokens": 3, "batch_size": 5, "num_resamples": 50}
    in_memory = evaluation.evaluate(*elm, splits["test"], training_dataset=splits["train"], **options)
    for name in ("schema_version", "conditions", "ecg_minus", "verdict", "num_questions", "num_patients", "not_scored"):
        assert in_memory[name] == results[name]
    assert in_memory["settings"].items() <= results["settings"].items()
    assert in_memory["data"]["fingerprint"] == results["data"]["fingerprint"]
    assert in_memory.predictions == results.predictions == predictions_in(folder)
    assert json.loads(json.dumps(in_memory)) == in_memory


def test_the_system_prompt_of_the_processor(elm, data):
    """Every question is asked with it, unless the caller says another."""
    rows, asked = list(load_from_disk(data)["test"])[:2], []
    model, processor = elm[0], copy(elm[1])
    processor.system_prompt = "Be brief."
    tokenizer = processor.tokenizer
    generate = type(model).generate

    def watch(self, input_ids, **kwargs):
        asked.append(tokenizer.decode(input_ids[0]))
        return generate(self, input_ids=input_ids, **kwargs)

    options = {"conditions": [], "metrics": [], "max_new_tokens": 1, "num_resamples": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "generate", watch)
        for system_prompt, expected in ((None, "Be brief."), ("Be kind.", "Be kind."), ("", None)):
            results = evaluation.evaluate(model, processor, rows, system_prompt=system_prompt, **options)
            assert results["settings"]["system_prompt"] == expected
            assert ("Be " in asked[-1]) is (expected is not None)
            assert (expected or "") in asked[-1]
    assert processor.system_prompt == "Be brief."


def test_in_memory_of_a_list_without_training_data(evaluated, elm, data, tmp_path, monkeypatch):
    """Nothing is written; without training data nothing is known of the most frequent answers."""
    monkeypatch.chdir(tmp_path)
    rows = list(load_from_disk(data)["test"])[:3]
    elm[0].train()
    options = {"conditions": ["swapped"], "metrics": [], "max_new_tokens": 3, "batch_size": 5, "num_resamples": 50}
    results = evaluation.evaluate(*elm, rows, **options)
    assert list(results["conditions"]) == ["ecg", "swapped"]
    assert results["data"]["split"] is None
    assert list(results["conditions"]["ecg"]["metrics"]) == ["exact_match"]
    predictions = [row for row in evaluated[1].predictions if row["row"] < 3]
    assert [row["ecg"] for row in results.predictions] == [row["ecg"] for row in predictions]
    assert not list(tmp_path.iterdir())
    chats = [
        [{"role": "user", "content": "Fast?"}, {"role": "assistant", "content": answer}] for answer in ("yes", "no")
    ]
    asked = [{**row, "messages": chat, "question_type": "rate"} for row, chat in zip(rows, chats, strict=False)]
    results = evaluation.evaluate(*elm, asked, score="likelihood", **options)
    assert [row["candidates"] for row in results.predictions] == [["no", "yes"]] * 2
    assert {"exact_match", "auroc"} <= set(results["conditions"]["swapped"]["metrics"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": ["louder"]}, "^conditions has louder; expected some of ecg, zeroed"),
        ({"metrics": ["accuracy"]}, "^metrics has accuracy; expected some of bert_score"),
        ({"score": "guess"}, "^score has guess; expected some of generation, likelihood"),
        ({"num_resamples": 0}, "^num_resamples is 0; it must be at least 1"),
        ({"seed": -1}, "^seed is -1; it must be at least 0"),
        ({"metrics": ["bert_score"]}, "^metrics bert_score .* name it with bert_score_model"),
        ({"generation": {"beams": 2}}, "^generation has beams; expected options of `generate`"),
        ({"generation": {"use_cache": False}}, "^generation has use_cache; expected options of `generate`"),
        (
            {"generation": {"min_new_tokens": 200}},
            "^generation min_new_tokens is 200, above max_new_tokens 128: no answer",
        ),
        ({"candidates": ["yes", "no"]}, "^candidates are what score likelihood decides among"),
        (
            {"main_metric": "meteor"},
            "^main_metric is meteor, which is not scored; expected one of exact_match, norm.* metrics, and",
        ),
        ({}, "The dataset has 1 row and no assistant turn to score"),
    ],
)
def test_bad_arguments_in_memory(elm, options, message):
    rows = [{"messages": [{"role": "user", "content": "Fast?"}]}]
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(*elm, rows, **options)


def test_notices_are_told_once_with_their_number_of_records(elm, data, caplog):
    rows = list(load_from_disk(data)["test"])[:3]
    for row in rows[:2]:
        array, names = row["ecg"]["array"], row["ecg"]["lead_names"]
        row["ecg"] = {**row["ecg"], "array": [*array, array[0]], "lead_names": [*names, "resp"]}
    evaluation.evaluate(*elm, rows, conditions=["zeroed", "swapped"], max_new_tokens=2, num_resamples=10)
    told = [record.getMessage() for record in caplog.records if "resp" in record.getMessage()]
    assert told == ["Left out, as no standard lead has that name: resp. (records: 2)"]


def test_no_dataset_in_memory(elm, data):
    with pytest.raises(ValueError, match=r"^dataset is a DatasetDict"):
        evaluation.evaluate(*elm, load_from_disk(data))
    with pytest.raises(ValueError, match=r"^dataset has the columns \['text'\]; expected messages and ecg"):
        evaluation.evaluate(*elm, [{"text": "Fast? yes"}])


@pytest.mark.slow
def test_a_further_condition_is_one_entry(elm, data, tmp_path, monkeypatch):
    """Asked, scored, in the verdict, in the report and its plots."""
    entry = Condition(
        "reversed", "ECG backwards", "#CC79A7", "the ECG backwards", "in reversed time", lambda a, rng: a[:, ::-1]
    )
    monkeypatch.setitem(CONDITIONS, "reversed", entry)
    for module in (evaluation, arguments):
        monkeypatch.setattr(module, "ASKED", (*ASKED, "reversed"))
    rows = load_from_disk(data)["test"]
    results = evaluation.evaluate(*elm, rows, conditions=["reversed"], max_new_tokens=2, num_resamples=50)
    assert list(results["conditions"]) == ["ecg", "reversed"]
    assert "over the ECG backwards" in results["verdict"]
    write_report(tmp_path / "report.html", results, results.predictions, rows)
    assert "<td>ECG backwards</td>" in (tmp_path / "report.html").read_text()
    assert b"<!-- ECG backwards -->" in scores_plot(results)


def test_every_number_of_the_report_is_in_the_results(evaluated):
    folder, results = evaluated
    page = (folder / "report.html").read_text()
    cells = [cell.replace("\xa0", " ") for cell in re.findall(r"<td class=(?:number|score)>(.*?)</td>", page)]

    def values(node: Any) -> list[float]:
        if isinstance(node, dict):
            return [value for child in node.values() for value in values(child)]
        if isinstance(node, list):
            return [value for child in node for value in values(child)]
        return [float(node)] if isinstance(node, int | float) else []

    known = {f"{100 * value:.1f}" for value in values(results)} | {f"{value:.4f}" for value in values(results)}
    known |= {
        p_in_words(row["p_value"], row.get("p_value_at_floor", False)).removeprefix("< ")
        for rows in results["ecg_minus"].values()
        for row in rows.values()
    }
    shown = [number for cell in cells for number in re.findall(r"-?\d+\.\d+", cell)]
    assert len(shown) > 50
    assert set(shown) <= known
    score = results["conditions"]["swapped"]["metrics"]["token_f1"]
    low, high = score["interval_95"]
    assert f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in cells


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(evaluated, model, data, tmp_path, monkeypatch):
    """What was answered is not asked again, a line that was cut is, and the results are the same."""
    folder, results = evaluated
    argv = argv_of(model, data, tmp_path, *SETTINGS)
    batches: list[str] = []
    answer = Answerer.answer_batch

    def some(self: Answerer, conversations: Any, condition: Any, batch: int) -> list[Any]:
        if len(batches) == 8:
            raise KeyboardInterrupt
        batches.append(condition.name)
        return answer(self, conversations, condition, batch)

    monkeypatch.setattr(Answerer, "answer_batch", some)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(argv)
    (partial,) = tmp_path.iterdir()
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:-1]) + lines[-1][:40])
    asked = len(batches) - 1
    batches.clear()
    monkeypatch.setattr(
        Answerer, "answer_batch", lambda self, *args: batches.append(args[1].name) or answer(self, *args)
    )
    assert evaluation.main(argv) == results
    assert len(batches) == len(ASKED) * 2 - asked  # ten rows, five at once
    assert not partial.exists()
    assert (tmp_path / "predictions.jsonl").read_text() == (folder / "predictions.jsonl").read_text()


@pytest.mark.slow
def test_answers_of_other_settings_are_not_taken(evaluated, model, data, tmp_path, no_report):
    (tmp_path / "predictions.partial.0.jsonl").write_text('another\n["ecg", 0, ["no", "no", "no"]]\n')
    assert evaluation.main(argv_of(model, data, tmp_path, *SETTINGS)) == evaluated[1]


@pytest.mark.slow
def test_two_processes_that_were_killed_give_what_one_gives(evaluated, model, data, tmp_path):
    folder, results = evaluated
    argv = argv_of(model, data, tmp_path, *SETTINGS)
    code = "from elm_ecg.training.evaluation.evaluate import main\nmain()"
    processes = fork_two(code, *argv)
    deadline = time.monotonic() + 300
    while sum(path.read_text().count("\n") for path in tmp_path.glob("predictions.partial.*")) < 3:
        assert time.monotonic() < deadline, "neither began to write"
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    assert [process.finish().returncode for process in processes] == [-signal.SIGKILL] * 2
    assert [process.finish().returncode for process in fork_two(code, *argv)] == [0, 0]
    assert json.loads((tmp_path / "evaluation_results.json").read_text()) == results
    assert (tmp_path / "predictions.jsonl").read_text() == (folder / "predictions.jsonl").read_text()


def evaluate_in_model(model: Path, data: Path, *options: str) -> dict[str, Any]:
    fast = ["--max_new_tokens", "2", "--num_resamples", "10", "--conditions", "left_out", "--batch_size", "16"]
    return evaluation.main(["--model_name_or_path", str(model), "--data", str(data), *fast, *options])


def test_each_evaluation_has_a_place_of_its_own(model, data, tmp_path, capsys, monkeypatch, no_report):
    """The same one replaces its files, others stand beside; the card has all; results of other weights move aside."""
    model = shutil.copytree(model, tmp_path / "elm")
    subset = evaluate_in_model(model, data, "--data_subset", "0.5")
    assert subset["num_patients"] == 5
    assert set(subset["conditions"]) == {"ecg", "left_out", "most_frequent"}
    first = model / "evaluation" / subset["evaluation"]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"Results, predictions and report in {first}",
        subset["verdict"],
    ]
    written = (first / "evaluation_results.json").read_text()
    whole = evaluate_in_model(model, data, "--metrics", "set_f1", "--main_metric", "set_f1")
    evaluate_in_model(model, data, "--metrics", "set_f1", "--main_metric", "set_f1")
    assert whole["verdict"].startswith("Set f1")
    places = {subset["evaluation"], whole["evaluation"]}
    assert {path.name for path in (model / "evaluation").iterdir()} == places
    assert (first / "evaluation_results.json").read_text() == written
    card = (model / "README.md").read_text()
    assert card.count(subset["verdict"]) == card.count(whole["verdict"]) == 1
    assert "Not evaluated yet" not in card
    assert "are of other weights" not in capsys.readouterr().out
    (model / "chat_template.jinja").write_text((model / "chat_template.jinja").read_text() + "{# other #}")
    again = evaluate_in_model(model, data, "--data_subset", "0.5")
    assert {path.name for path in (model / "evaluation").iterdir()} == {again["evaluation"]} == {subset["evaluation"]}
    assert {path.name for path in (model / "old_results" / "1" / "evaluation").iterdir()} == places
    assert "are of other weights" in capsys.readouterr().out
    assert whole["verdict"] not in (model / "README.md").read_text()


def test_an_output_dir_with_other_results_is_not_overwritten(model, data, evaluated, tmp_path):
    folder, _ = evaluated
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError, match=r"holds the results of other data or settings \(data-test-generation-.*not overwritten"
    ):
        evaluate_in_model(model, data, "--output_dir", str(folder))
    other = shutil.copytree(model, tmp_path / "elm")
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "{# other #}")
    with pytest.raises(ValueError, match="holds the results of other weights"):
        evaluation.main(argv_of(other, data, folder, *SETTINGS))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_evaluation_that_ends_while_it_writes(model, data, tmp_path, monkeypatch, no_report):
    """What was there is there, results and predictions belong together, and the same command ends as it would have."""
    options = ["--output_dir", str(tmp_path)]
    expected = evaluate_in_model(model, data, *options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results_module, "write_json", killed)  # the predictions are written, the results are not
        with pytest.raises(KeyboardInterrupt):
            evaluate_in_model(model, data, *options)
    (partial,) = {path.name for path in tmp_path.iterdir()} - before.keys()
    assert partial == "predictions.partial.0.jsonl"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert compare.read_model(tmp_path / "evaluation_results.json").predictions == expected.predictions
    monkeypatch.setattr(Answerer, "answer_batch", lambda *args: pytest.fail("it was answered already"))
    assert evaluate_in_model(model, data, *options) == expected
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


CHANGES = {
    "processor_config.json": lambda text: text.replace('"normalization": "none"', '"normalization": "zscore"'),
    "chat_template.jinja": lambda text: text + "{{ ' so' }}",
}


@pytest.mark.parametrize(
    "changed", ["the ECG's file", *(pytest.param(name, marks=pytest.mark.slow) for name in CHANGES)]
)
def test_an_interrupted_evaluation_takes_no_answers_of_what_was_changed(
    model, data, tmp_path, monkeypatch, changed, no_report
):
    """Each of these left 37 to 66 of 133 answers wrong, without a word."""
    rows = list(load_data(EvaluationArguments(data=[str(data)]), "test").with_format(None))[:2]
    for index, row in enumerate(rows):
        row["ecg"] = str(save_record(tmp_path / f"{index}.npz", seed=index, seconds=5))
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / "data")
    model = shutil.copytree(model, tmp_path / "elm")
    options = ["--conditions", "zeroed", "--max_new_tokens", "6", "--batch_size", "1", "--num_resamples", "10"]
    argv = ["--model_name_or_path", str(model), "--data", str(tmp_path / "data"), "--ecg_root", str(tmp_path), *options]
    answer, asked = Answerer.answer_batch, []

    def interrupted(self: Answerer, conversations: Any, condition: Any, batch: int) -> list[Any]:
        if condition.name == "zeroed":
            raise KeyboardInterrupt
        return answer(self, conversations, condition, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluation.main(argv)
    (partial,) = model.glob("evaluation/*/predictions.partial.0.jsonl")
    assert len(partial.read_text().split()) > 2
    if changed in CHANGES:
        text = (model / changed).read_text()
        (model / changed).write_text(CHANGES[changed](text))
        assert (model / changed).read_text() != text
    else:
        save_record(tmp_path / "1.npz", seed=9, seconds=5)  # at the same place
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer_batch", _watched(answer, asked))
        evaluation.main(argv)
    assert asked.count("ecg") == 2  # anew


def test_a_list_of_records_and_names_alone(elm, data):
    """`ECGRecord`s stand in rows as `read_ecg` gives them; a single metric or condition needs no list; no training rows, no baseline."""
    rows = list(load_from_disk(data)["test"])[:2]
    options = {"conditions": "left_out", "metrics": "token_f1", "max_new_tokens": 4, "num_resamples": 10}
    expected = evaluation.evaluate(*elm, rows, **options)
    assert list(expected["conditions"]) == ["ecg", "left_out"]
    assert set(expected["metrics"]) == {"exact_match", "token_f1"}
    records = [{**row, "ecg": as_record(row["ecg"])} for row in rows]
    found = evaluation.evaluate(*elm, records, training_dataset=[], **options)
    assert found == expected
    assert found.predictions == expected.predictions
    assert evaluation.evaluate(*elm, [{**row, "ecg": [row["ecg"]]} for row in records], **options) == expected
    with pytest.raises(ValueError, match="The dataset has 0 rows"):
        evaluation.evaluate(*elm, [])


def test_notices_of_records_are_told(elm, data, caplog):
    row = next(iter(load_from_disk(data)["test"]))
    record = with_notices(as_record(row["ecg"]), "The lead V6 was drawn by hand.")
    evaluation.evaluate(*elm, [{**row, "ecg": record}], conditions="left_out", max_new_tokens=2, num_resamples=10)
    assert "The lead V6 was drawn by hand. (records: 1)" in caplog.text


def test_a_metric_of_ones_own(elm, data, tmp_path):
    """From the command's options to the report: in its units, and tried before the model is asked."""
    path = tmp_path / "length_error.py"
    path.write_text(LENGTH_ERROR)
    rows = load_from_disk(data)["test"]
    options = {"conditions": "left_out", "max_new_tokens": 4, "num_resamples": 20, "batch_size": 16}
    results = evaluation.evaluate(*elm, rows, metrics=str(path), main_metric="length_error", **options)
    value = np.mean([abs(len(row["ecg"]) - len(row["answer"])) for row in results.predictions])
    assert results["conditions"]["ecg"]["metrics"]["length_error"]["value"] == pytest.approx(value)
    assert results["verdict"].startswith(f"Error of the length {value:.1f} [")
    assert "] letters (" in results["verdict"]
    write_report(tmp_path / "report.html", results, results.predictions, rows)
    page = (tmp_path / "report.html").read_text()
    assert "<td>error of the length (letters, lower is better)</td>" in page
    path.write_text(LENGTH_ERROR.replace("abs(", "1 / 0 or abs("))
    with pytest.raises(ValueError, match="The metric length_error fails on the right answers: ZeroDivisionError"):
        evaluation.evaluate(*elm, rows, metrics=[str(path)], **options)


LENGTH_ERROR = """
\"\"\"How many letters an answer is too long or too short.\"\"\"

from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.evaluation.text import PairMetric


class LengthError(PairMetric):
    \"\"\"Of each pair.\"\"\"

    scale = MetricScale(title="error of the length", unit="letters", high=None, higher_is_better=False)

    def _score(self, prediction, reference):
        return abs(len(prediction) - len(reference))
"""


def test_the_fingerprint_is_of_the_samples(elm, data):
    """The same words about other ECGs are other data; and other units of the same samples the same."""
    rows = list(load_from_disk(data)["test"])[:2]

    def fingerprint(*ecgs: Any) -> str:
        table = evaluation._as_dataset([{**row, "ecg": ecg} for row, ecg in zip(rows, ecgs, strict=True)], "dataset")
        return fingerprint_of(table, list_questions(table))

    first, second = (row["ecg"] for row in rows)
    before = fingerprint(first, second)
    assert fingerprint(second, first) != before
    array = np.array(first["array"])
    assert fingerprint({**first, "array": (array / 1000).tolist(), "unit": "mV"}, second) == before
    array[3, 7] += 1
    assert fingerprint({**first, "array": array.tolist()}, second) != before
    assert fingerprint({**first, "sampling_rate": 200}, second) != before
    assert fingerprint({**first, "lead_names": first["lead_names"][::-1]}, second) != before


def test_nothing_to_swap(model, data, tmp_path, caplog):
    """All else is scored where there is one patient alone; a type of question for the row counts for each answer."""
    row = load_data(EvaluationArguments(data=[str(data)]), "test").with_format(None)[0]
    DatasetDict(test=Dataset.from_list([{**row, "question_type": ["rhythm"]}])).save_to_disk(tmp_path / "data")
    options = ["--max_new_tokens", "2", "--num_resamples", "10"]
    results = evaluation.main(argv_of(model, tmp_path / "data", tmp_path, *options))
    assert set(results["conditions"]) == set(ASKED) - {"swapped"}
    assert set(results["questions_by_type"]) == {"rhythm"}
    assert results["not_scored"]["swapped"] == "There is one row alone, and so no other ECG to swap in."
    assert "another patient's ECG: not scored. There is one row alone" in caplog.text
    assert "the questions are about 1 patient, and fewer than 10 are too few" in results["verdict"]


def test_likelihood(model, data, tmp_path):
    """Every answer is one of those of its type; the AUROC is that of their likelihoods."""
    rows = load_data(EvaluationArguments(data=[str(data)]), "test").with_format(None)
    chats = [
        [{"role": "user", "content": "Fast?"}, {"role": "assistant", "content": a}] for a in ("yes", "no", "yes", "no")
    ]
    asked = [{**row, "messages": chat, "question_type": "rate"} for row, chat in zip(rows, chats, strict=False)]
    DatasetDict(test=Dataset.from_list(asked)).save_to_disk(tmp_path / "data")
    options = ["--score", "likelihood", "--num_resamples", "10"]
    results = evaluation.main(argv_of(model, tmp_path / "data", tmp_path, *options))
    predictions = predictions_in(tmp_path)
    for row in predictions:
        assert row["candidates"] == ["no", "yes"]
        for condition, logs in row["log_likelihoods"].items():
            assert row[condition] == row["candidates"][int(np.argmax(logs))]
    odds = [row["log_likelihoods"]["ecg"][1] - row["log_likelihoods"]["ecg"][0] for row in predictions]
    wins = [odds[i] > odds[j] for i in (0, 2) for j in (1, 3)]
    assert results["conditions"]["ecg"]["metrics"]["auroc"]["value"] == np.mean(wins)
    assert "AUROC" in (tmp_path / "report.html").read_text()
    DatasetDict(test=Dataset.from_list(asked[:1])).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"have 1 different answer; --score likelihood .* Give them as --candidates"):
        evaluation.main(argv_of(model, tmp_path / "one", tmp_path / "out", *options))


@pytest.mark.slow
def test_folds_and_seeds(model, data, tmp_path, caplog, capsys, no_report):
    """Without sampling a further seed asks of noise and swapped ECGs alone."""
    rows = load_data(EvaluationArguments(data=[str(data)]), "test").with_format(None)
    halves = {f"fold{fold}_test": rows.select(range(start, start + 3)) for fold, start in ((1, 0), (2, 3))}
    DatasetDict(halves).save_to_disk(tmp_path / "data")
    asked: list[str] = []
    ask = Answerer.ask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "answer_batch", _watched(Answerer.answer_batch, asked))
        summary = evaluation.main(
            argv_of(model, tmp_path / "data", tmp_path / "out", *SETTINGS, "--fold", "1", "2", "--seed", "0", "5")
        )
    assert Answerer.ask is ask
    per_fold = 3 + 2 * 2  # three conditions once, two for each seed
    assert len(asked) == 2 * per_fold
    assert (
        "the seed changes only noise and swapped: what it does not change is asked once, for seed 0, seed 5."
        in caplog.text
    )
    assert json.loads((tmp_path / "out" / "evaluation_summary.json").read_text()) == summary
    assert [(run["fold"], run["seed"]) for run in summary["runs"]] == [(1, 0), (1, 5), (2, 0), (2, 5)]
    results = {
        (fold, seed): json.loads(
            (tmp_path / "out" / f"fold{fold}" / f"seed{seed}" / "evaluation_results.json").read_text()
        )
        for fold in (1, 2)
        for seed in (0, 5)
    }
    values = {
        key: {name: row["metrics"]["token_f1"]["value"] for name, row in run["conditions"].items()}
        for key, run in results.items()
    }
    assert values[1, 0]["zeroed"] == values[1, 5]["zeroed"]
    for condition, runs in (("ecg", [(1, 0), (2, 0)]), ("noise", list(results))):
        found = summary["conditions"][condition]["token_f1"]
        scores = [values[run][condition] for run in runs]
        assert found["num_runs"] == len(runs)
        assert found["mean"] == pytest.approx(np.mean(scores))
        assert (found["interval_95"] is None) == (len(set(scores)) == 1)
    told = capsys.readouterr().out.splitlines()
    assert any("exact match" in line for line in told)
    assert told[-1] == summary["verdict"]
    assert told[-1].startswith("The verdict of 0 of the 4 runs is")
    assert not list(tmp_path.rglob("predictions.partial.*"))


def _watched(answer: Any, asked: list[str]) -> Any:
    def watch(self: Answerer, conversations: Any, condition: Any, batch: int) -> list[Any]:
        asked.append(condition.name)
        return answer(self, conversations, condition, batch)

    return watch


def test_over_one_run_nothing_spreads():
    run = {"data": {"fold": None}, "settings": {"seed": 0}, "model_revision": "r"}
    run["conditions"] = {"ecg": {"metrics": {"exact_match": {"value": 0.5}, "auroc": {"value": None}}}}
    row = {"mean": 0.5, "std": None, "interval_95": None, "num_runs": 1}
    run |= {"metrics": {}, "main_metric": "exact_match", "verdict": "the model may not look at the ECG."}
    assert over_runs([run], [0], False)["conditions"] == {"ecg": {"exact_match": row}}
    other = {**run, "data": {"fold": 1}}
    third = {**run, "conditions": {"ecg": {"metrics": {"exact_match": {"value": 0.7}}}}}
    found = over_runs([run, third], [0], False)["conditions"]["ecg"]["exact_match"]
    half = student_t.ppf(0.975, 1) * np.std([0.5, 0.7], ddof=1) / 2**0.5
    assert found["interval_95"] == pytest.approx([0.6 - half, 0.6 + half])
    third["verdict"] = "the model looks at the ECG; with another patient's it was not compared."
    told = "The verdict of 1 of the 2 runs is that the model looks at the ECG."
    assert over_runs([run, third], [0], False)["verdict"] == told
    # nor over two that agree
    assert over_runs([run, other], [0], False)["conditions"] == {"ecg": {"exact_match": {**row, "num_runs": 2}}}


def test_compare(evaluated, model, data, tmp_path, capsys, no_report):
    """The results are what `elm compare` reads."""
    folder, _ = evaluated
    evaluation.main(
        argv_of(model, data, tmp_path, "--max_new_tokens", "2", "--num_resamples", "10", "--conditions", "ecg")
    )
    compare.main([str(folder / "evaluation_results.json"), str(tmp_path / "evaluation_results.json")])
    assert "| exact_match |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "validation"], "has no split 'validation'"),
        (["--perturb", "noise"], "--perturb cannot be used: evaluation changes the ECGs itself"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--seed", "3", "-1"], r"--seed is \[3, -1\]; it must be at least 0"),
        (["--num_resamples", "-1"], "--num_resamples is -1"),
        (["--data_subset", "2"], "--data_subset is 2.0"),
        (["--metrics", "bert_score"], "name it with --bert_score_model"),
        (["--metrics", "accuracy"], "--metrics has accuracy; expected some of bert_score, .*, the path of a metric"),
        (["--metrics", "./accuracy.py"], r"There is no metric \./accuracy\.py: no file accuracy\.py"),
        (["--main_metric", "auroc"], "--main_metric is auroc, which is not scored; .* auroc needs --score likelihood"),
        (["--fold", "1", "2"], "--fold 1 with data without folds; leave it out"),
        (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere cannot be written: .*Name another"),
        (["--seed", "1", "1"], "--seed 1 1 names one twice"),
        (["--candidates", "yes", "no"], "add that, or leave them out"),
        (["--score", "likelihood", "--candidates", "yes", "maybe"], "is none of the --candidates maybe, yes"),
        (["--generation_kwargs", "{'"], "--generation_kwargs is not JSON"),
        (
            ["--generation_kwargs", '{"beams": 2, "num_return_sequences": 2}'],
            "has beams, num_return_sequences; expected",
        ),
        (["--score", "likelihood", "--generation_kwargs", '{"num_beams": 2}'], "generates nothing"),
        (
            ["--generation_kwargs", '{"stop_strings": ["x"], "eos_token_id": "x"}'],
            "--generation_kwargs eos_token_id is 'x'; expected the number of a token, or a list of them",
        ),
        (
            ["--generation_kwargs", '{"suppress_tokens": [1, true]}'],
            r"suppress_tokens is \[1, True\]; expected a list of the num",
        ),
        (
            ["--max_new_tokens", "3", "--generation_kwargs", '{"min_new_tokens": 4}'],
            "--generation_kwargs min_new_tokens is 4, above --max_new_tokens 3",
        ),
        (["--generation_kwargs", '{"top_k": "2"}'], "top_k is '2'; expected a whole number"),
        (["--generation_kwargs", '{"temperature": "2"}'], "temperature is '2'; expected a number, true or false"),
        (["--generation_kwargs", '{"num_beams": 2.5}'], "num_beams is 2.5; expected a whole number"),
        (["--generation_kwargs", '{"no_repeat_ngram_size": true}'], "no_repeat_ngram_size is True; expected a whole"),
        (["--generation_kwargs", '{"pad_token_id": [1]}'], r"pad_token_id is \[1\]; expected the number of a token"),
        (["--generation_kwargs", '{"suppress_tokens": 1}'], "suppress_tokens is 1; expected a list of the numbers"),
        (
            ["--generation_kwargs", '{"stop_strings": [1]}'],
            r"stop_strings is \[1\]; expected a text, or a list of texts",
        ),
        (
            ["--generation_kwargs", '{"early_stopping": ["never"]}'],
            r"early_stopping is \['never'\]; expected true, false",
        ),
        (
            ["--generation_kwargs", '{"exponential_decay_length_penalty": [1]}'],
            r"exponential_decay_length_penalty is \[1\]; expected a list of two numbers",
        ),
        (["--generation_kwargs", '{"sequence_bias": [1]}'], r"sequence_bias is \[1\]; expected a list of lists"),
        (["--generation_kwargs", '{"watermarking_config": 1}'], "watermarking_config is 1; expected names and values"),
        (["--generation_kwargs", '{"to_dict": 1}'], "has to_dict; expected options of `generate`"),
    ],
)
def test_bad_input(model, data, options, message, monkeypatch):
    """All of it is told before the model is loaded."""
    monkeypatch.setattr(evaluation, "load_elm", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        evaluation.main(["--model_name_or_path", str(model), "--data", str(data), *options])


def test_an_empty_split(model, data, tmp_path):
    rows = load_data(EvaluationArguments(data=[str(data)]), "test").with_format(None)
    DatasetDict(test=rows.select([])).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds an empty split"):
        evaluation.main(argv_of(model, tmp_path / "saved", tmp_path))
    (tmp_path / "parquet").mkdir()
    rows.select([]).to_parquet(tmp_path / "parquet" / "test.parquet")
    with pytest.raises(ValueError, match="corresponds to no data"):
        evaluation.main(argv_of(model, tmp_path / "parquet", tmp_path))
    asked = Dataset.from_list([{**rows[0], "messages": rows[0]["messages"][:1]}])
    DatasetDict(test=asked).save_to_disk(tmp_path / "asked")
    with pytest.raises(ValueError, match="has 1 row and no assistant turn to score"):
        evaluation.main(argv_of(model, tmp_path / "asked", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_model(data, tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json and no config\.json"):
        evaluation.main(["--model_name_or_path", str(tmp_path), "--data", str(data)])
    with pytest.raises(ValueError, match="Which model"):
        evaluation.main(["--data", str(data)])
