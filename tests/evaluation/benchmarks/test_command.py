import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from elm_ecg import ELMProcessor, new_elm
from elm_ecg.training import cli
from elm_ecg.training.evaluation import report
from elm_ecg.training.evaluation.benchmarks import command, endpoint
from elm_ecg.training.evaluation.benchmarks.tables import write_tables
from elm_ecg.training.evaluation.results import read_predictions, read_results
from helpers import TINY_ENCODERS, save_record, write_rows

NUM_RECORDS = 10  # fewer patients have no intervals


def question(kind: str, answer: Any, *options: str) -> dict[str, Any]:
    return {"question": f"What of {kind}?", "answer": answer, "options": [*options], "question_type": kind}


def reasoning_sample(record: int) -> dict[str, Any]:
    yes = "Yes" if record % 2 else "No"
    loop = {
        "criterion_selection": question("criterion_selection", "Q waves", "Q waves", "P waves"),
        "finding_identification": question("finding_identification", yes, "Yes", "No"),
        "ecg_grounding": [question("lead_grounding", ["Lead V2"], "Lead V1", "Lead V2")],
        "diagnostic_decision": question("diagnostic_decision", yes, "Yes", "No"),
    }
    first = question("initial_diagnostic_question", yes, "Yes", "No")
    return {"metadata": {"ecg_id": str(record)}, "data": {"initial_diagnostic_question": first, "reasoning": [loop]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Records, a table about them, and the texts of the suites."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "ecgs").mkdir()
    rows, qa = [], []
    for record in range(1, NUM_RECORDS + 1):
        save_record(folder / "ecgs" / f"{record:05d}.npz", seed=record)
        classes = {
            "superclass": ("MI", "NORM")[record % 2],
            "subclass": "",
            "form": "",
            "rhythm": ("SR AFIB", "SR")[record % 3 > 0],
        }
        rows.append({"record": record, "patient_id": record, "strat_fold": 10, **classes})
        asked = {"template_id": 2, "question_type": "single-verify", "split": "test", "ecg_id": [record]}
        qa.append({"question": "Is there noise?", "answer": [("no", "yes")[record % 2]], **asked})
    qa.append({**qa[0], "ecg_id": [1, 2], "question_type": "comparison_irrelevant-verify"})
    qa.append({**qa[0], "ecg_id": [99]})
    write_rows(folder / "records.csv", *rows)
    codes = {"MI": "", "NORM": "normal ECG", "SR": "sinus rhythm", "AFIB": "atrial fibrillation"}
    columns = ("diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")
    write_rows(
        folder / "scp_statements.csv",
        *({"": code, "description": text, **dict.fromkeys(columns, "")} for code, text in codes.items()),
    )
    write_rows(folder / "qa.jsonl", *qa)
    write_rows(folder / "reasoning" / "ptbxl.jsonl", *map(reasoning_sample, range(1, NUM_RECORDS + 1)))
    return folder


@pytest.fixture(scope="module")
def elm(tmp_path_factory, llm) -> Path:
    folder = tmp_path_factory.mktemp("elm") / "tiny"
    options = {
        "encoder": "merl",
        "encoder_config": json.dumps(TINY_ENCODERS["merl"]),
        "num_samples": 500,
        "sampling_rate": 250,
    }
    model, processor = new_elm(str(llm), **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def argv_of(place: Path, model: str | Path, *suites: str) -> list[str]:
    texts = {
        "ecg-qa": f"ecg-qa={place / 'qa.jsonl'}",
        "ecg-reasoning": f"ecg-reasoning={place / 'reasoning'}",
        "ptbxl": "ptbxl",
    }
    about = ["--records", str(place / "ecgs"), "--metadata", str(place / "records.csv")]
    return [str(model), "--suite", *map(texts.get, suites), *about, "--max_new_tokens", "2", "--num_resamples", "20"]  # type: ignore[list-item]


@pytest.fixture(scope="module")
def run(tmp_path_factory, place, elm) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("out")
    argv = [*argv_of(place, elm, "ecg-qa", "ecg-reasoning", "ptbxl"), "--output_dir", str(folder)]
    write_report = command.write_report

    def one_report(path: Path, *args: Any) -> None:
        if path.parent.name == "ptbxl":
            write_report(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "write_report", one_report)
        patch.setattr(report, "PICTURE_WIDTH", 300)  # of examples that no test looks at
        return folder, command.main([*argv, "--conditions", "zeroed"])


@pytest.fixture(autouse=True)
def no_report(run, monkeypatch):
    """That of the first run is enough, as they take longest."""
    monkeypatch.setattr(command, "write_report", lambda *args: None)


def test_files(run):
    folder, results = run
    assert [*results] == ["ecg-qa", "ecg-reasoning", "ptbxl"]
    files = {"evaluation_results.json", "predictions.jsonl", "table.md", "table.tex"}
    assert (folder / "ptbxl" / "report.html").stat().st_size
    for name, of_suite in results.items():
        assert {path.name for path in (folder / name).iterdir()} - {"report.html"} == files
        saved = read_results(folder / name / "evaluation_results.json")
        assert saved == json.loads(json.dumps(of_suite))
        assert read_predictions(folder / name / "evaluation_results.json", saved) == of_suite.predictions
        assert [*saved["conditions"]] == ["ecg", "zeroed"]
        assert saved["num_patients"] == NUM_RECORDS
        assert saved["suite"]["name"] == name
        assert saved["conditions"]["ecg"]["metrics"][saved["main_metric"]]["value"] is not None
    assert results["ecg-qa"]["suite"]["left_out"] == {"questions whose records are not there": 1}
    assert results["ecg-qa"]["num_questions"] == NUM_RECORDS + 1
    assert [of_suite["data"]["split"] for of_suite in results.values()] == ["test", None, "test"]  # reasoning has none
    # a question and a chain of four for each
    assert results["ecg-reasoning"]["num_questions"] == 5 * NUM_RECORDS
    assert {"auroc_superclass", "auroc_rhythm"} <= results["ptbxl"]["conditions"]["ecg"]["metrics"].keys()


def test_tables(run):
    folder, results = run
    lines = (folder / "ecg-reasoning" / "table.md").read_text().splitlines()
    assert "2603.14326): 50 questions about 10 patients" in lines[0]  # no split, as it has none
    # so many scores are rows, below the model and what it is shown
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["model", "tiny", "tiny"]
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == ["shown", "with its ECG", "ECG zeroed"]
    depth = results["ecg-reasoning"]["conditions"]["ecg"]["metrics"]["depth"]
    low, high = depth["interval_95"]
    (line,) = (line for line in lines if line.startswith("| depth "))
    assert f"{depth['value']:.2f} [{low:.2f}, {high:.2f}]" in line
    heading = (folder / "ecg-reasoning" / "table.tex").read_text().partition(r"\midrule")[0]
    assert r"\begin{tabular}{lrr}" in heading
    assert heading.endswith("model & tiny & tiny \\\\\nshown & with its ECG & ECG zeroed \\\\\n")
    assert (
        "- tiny, questions whose records are not there: 1." in (folder / "ecg-qa" / "table.md").read_text().splitlines()
    )
    *_, heading, _, first, second, third = (folder / "ptbxl" / "table.md").read_text().splitlines()
    assert "| tiny, AUROC " in heading
    by_type = (first, second, third)
    assert [line.split("|")[1].strip() for line in by_type] == ["rhythm AFIB", "superclass MI", "superclass NORM"]
    latex = (folder / "ptbxl" / "table.tex").read_text()
    assert latex.count(r"\\") == 3  # a heading and two conditions
    assert r"split test: 30 questions" in latex
    assert r"\begin{tabular}{llrrr}" in latex


def test_tables_of_too_few_questions(run, tmp_path):
    """No statement has both answers, so that there is no AUROC."""
    suite, results = command.SUITES["ptbxl"], run[1]["ptbxl"]
    few = results | {"metrics": {name: of for name, of in results["metrics"].items() if name not in suite.scales}}
    write_tables(tmp_path, suite, {Path("some"): few})
    note = "None of the scores can be had of these questions: they are too few."
    assert f"- {note}" in (tmp_path / "table.md").read_text().splitlines()
    assert note in (tmp_path / "table.tex").read_text()


def test_models_of_one_name_are_told_apart(run, tmp_path):
    """By the folders in which they differ, in every row, column and note."""
    suite, results = command.SUITES["ecg-qa"], run[1]["ecg-qa"]
    told = results | {"settings": results["settings"] | {"describe": True}}
    write_tables(tmp_path, suite, {Path("a/x"): results, Path("b/x"): results, Path("c/x"): told})
    text = (tmp_path / "table.md").read_text()
    assert {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| tiny")} == {
        "tiny (a)",
        "tiny (b)",
        "tiny (ECG in words)",
    }
    assert "- tiny (b), questions whose records are not there: 1." in text


def test_the_scores_with_the_ecg_are_beside_those_without(run):
    """What each condition scores is in `ecg_minus` too."""
    _, results = run
    for of_suite in results.values():
        for name, row in of_suite["ecg_minus"]["zeroed"].items():
            scores = [of_suite["conditions"][condition]["metrics"][name]["value"] for condition in ("ecg", "zeroed")]
            assert row["difference"] == pytest.approx(scores[0] - scores[1])


def test_compare_and_tables_of_two_models(run, place, llm, tmp_path, capsys):
    """The second is a language model that is told the ECG in words."""
    folder, results = run
    argv = [
        *argv_of(place, llm, "ecg-reasoning", "ptbxl"),
        "--describe",
        "--output_dir",
        str(tmp_path),
        "--beside",
        str(folder),
    ]
    told = command.main([*argv, "--conditions", "ecg"])
    table = (tmp_path / "ecg-reasoning" / "table.md").read_text()
    models = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert models == ["model", "llm (ECG in words)", "tiny", "tiny"]
    assert told["ptbxl"]["model"] == "llm"
    for suite, metric in (("ecg-reasoning", "initial_diagnosis"), ("ptbxl", "auroc")):
        paths = [str(one / suite) for one in (folder, tmp_path)]
        assert cli.main(["compare", *paths, "--num_resamples", "50", "--output", str(tmp_path / "compared.json")]) == 0
        compared = json.loads((tmp_path / "compared.json").read_text())
        for name, of_model in (("tiny", results), ("llm", told)):
            value = of_model[suite]["conditions"]["ecg"]["metrics"][metric]["value"]
            assert compared["models"][name][metric]["value"] == pytest.approx(value)
    assert "completion" in capsys.readouterr().out


def test_without_an_output_folder_they_lie_where_evaluations_do(run, place, elm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--conditions", "ecg", "--limit", "3"]
    results = command.main([*argv_of(place, elm, "ecg-qa"), *options])
    (found,) = (elm / "evaluation").iterdir()
    assert found.name == results["ecg-qa"]["evaluation"]
    assert found.name.startswith("ecg-qa-test-generation-")
    assert results["ecg-qa"]["num_questions"] == 3
    assert not [*tmp_path.iterdir()]


def parts_of(body: dict[str, Any], kind: str) -> list[Any]:
    return [part[kind] for turn in body["messages"] for part in turn["content"] if part["type"] == kind]


@pytest.mark.slow
def test_an_endpoint_is_shown_the_drawn_ecg(place, server, tmp_path, monkeypatch):
    url, asked, states = server.url, server.asked, server.states
    states += [503]
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    argv = [*argv_of(place, "some/model", "ecg-reasoning"), "--endpoint", url, "--output_dir", str(tmp_path)]
    argv += ["--limit", "4", "--conditions", "zeroed", "left_out", "--system_prompt", "Be brief."]
    results = command.main(argv)["ecg-reasoning"]
    number = results["num_questions"]
    assert len(asked) == 3 * number + 1
    assert {body["path"] for body in asked} == {"/v1/chat/completions"}
    assert {body["key"] for body in asked} == {"Bearer a-key"}
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in asked} == {("some/model", 2, 0)}
    for row in results.predictions:
        right = row["suite"].get("initial_diagnosis") or row["suite"].get("finding_identification_with_gold_history")
        assert right is None or right == [row["answer"] == "Yes", 1]
    assert results["conditions"]["ecg"]["metrics"]["completion"]["value"] == 0
    pictures = [parts_of(body, "image_url") for body in asked]
    # the repeated request, with the ECG and zeroed; none where it is left out
    assert sum(len(of_body) == 1 for of_body in pictures) == 2 * number + 1
    picture = next(of_body[0]["url"] for of_body in pictures if of_body)
    drawn = Image.open(io.BytesIO(base64.b64decode(picture.partition("base64,")[2])))
    assert drawn.size[0] == 1100
    last = max(asked, key=lambda body: len(body["messages"]))
    assert [turn["role"] for turn in last["messages"]] == ["system", *("user", "assistant") * 3, "user"]
    assert parts_of(last, "text")[2] == "Q waves"  # the right answers to the questions before


def test_an_endpoint_is_told_the_ecg(place, server, tmp_path):
    url, asked = server.url, server.asked
    argv = [*argv_of(place, "m", "ecg-qa"), "--endpoint", url, "--describe", "--output_dir", str(tmp_path)]
    command.main([*argv, "--conditions", "ecg"])
    assert not any(parts_of(body, "image_url") for body in asked)
    texts = ["".join(parts_of(body, "text")) for body in asked]
    assert sum(text.startswith("The ECG: ") for text in texts) == NUM_RECORDS
    (compared,) = (text for text in texts if "The second ECG: " in text)
    assert compared.startswith("The first ECG: ")


def test_an_endpoint_leaves_a_folder_of_its_models_name_alone(place, elm, server, tmp_path, monkeypatch):
    """Servers name models by their folders."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in elm.rglob("*")}
    command.main([*argv_of(place, elm, "ecg-qa"), "--endpoint", server.url, "--limit", "1", "--conditions", "ecg"])
    assert {path: path.stat().st_mtime_ns for path in elm.rglob("*")} == before
    assert [*(tmp_path / "evaluation" / elm.name).iterdir()]


def test_faults_of_an_endpoint(place, server, tmp_path, monkeypatch, capsys):
    url, asked, states = server.url, server.asked, server.states
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    for given, message in (
        (["--endpoint", "localhost"], "--endpoint is localhost; expected an address such as http://"),
        (["--endpoint", url], "does not answer (401 Unauthorized"),
        (["--endpoint", "http://127.0.0.1:9"], "does not answer (["),
    ):
        states[:] = [401] * 100
        argv = ["benchmark", *argv_of(place, "m", "ecg-qa"), *given, "--limit", "1", "--output_dir", str(tmp_path)]
        assert cli.main(argv) == 1
        assert message in capsys.readouterr().err
    assert len(asked) == 1  # a key that is refused is not tried again
    assert cli.main(["benchmark", *argv_of(place, "m", "ptbxl"), "--endpoint", url]) == 1
    assert "--suite ptbxl is decided by how likely a model finds its answers" in capsys.readouterr().err


def test_wrong_options(place, elm, llm, tmp_path, capsys):
    about = ["--records", str(place / "ecgs")]
    np.savez(tmp_path / "no_rate.npz", ecg=np.zeros((2, 12, 500), np.float32), ecg_id=[1, 2])
    for argv, message in (
        ([str(elm), "--suite", "ecgqa", *about], "--suite ecgqa: there is no such suite. Did you mean ecg-qa?"),
        (
            [str(elm), "--suite", "ecg-qa", *about],
            "--suite ecg-qa is not on the Hub: say where its texts are, ecg-qa=FOLDER",
        ),
        ([str(elm), "--suite", "ptbxl", "ptbxl", *about], "names ptbxl twice"),
        ([str(elm), "--suite", f"ecg-qa={tmp_path}/no", *about], "there is no file or folder"),
        ([str(elm), "--suite", "ptbxl", *about, "--show_options"], "--show_options is about ecg-qa"),
        ([str(elm), "--suite", "ptbxl", *about, "--seed", "-1"], "--seed is -1"),
        ([str(elm), "--suite", "ptbxl", *about, "--beside", "none"], "--beside none: there is no such folder"),
        (
            [str(elm), "--suite", "ptbxl", *about, "--endpoint", "http://localhost/v1", "--dtype", "float16"],
            "--dtype changes nothing at the model behind --endpoint",
        ),
        (
            [str(elm), "--suite", f"ecg-qa={place / 'qa.jsonl'}", "--records", str(tmp_path / "no_rate.npz")],
            "--records: the record '1' of an archive: The ECG has no sampling rate: give sampling_rate in hertz",
        ),
        ([*argv_of(place, elm, "ecg-reasoning"), "--split", "train"], "--split train: ecg-reasoning has no splits"),
        ([*argv_of(place, llm, "ecg-qa")], "reads texts alone; say --describe"),
        ([*argv_of(place, elm, "ecg-qa"), "--describe"], "is an ELM; leave it out"),
        ([*argv_of(place, tmp_path / "no", "ecg-qa")], "no"),
    ):
        assert cli.main(["benchmark", *argv, "--output_dir", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]


def test_a_model_that_thinks_has_room_for_it(place, elm, tmp_path, monkeypatch, capsys):
    processor = ELMProcessor.from_pretrained(elm)
    processor.explicit_thinking = True
    shutil.copytree(elm, tmp_path / "thinks")
    processor.save_pretrained(tmp_path / "thinks")
    monkeypatch.setattr(command, "OF_THINKING", 3)
    suites = ["--suite", f"ecg-reasoning={place / 'reasoning'}"]
    argv = ["--records", str(place / "ecgs"), "--limit", "1", "--conditions", "ecg", "--num_resamples", "20"]
    argv += ["--output_dir", str(tmp_path / "out")]
    results = command.main([str(tmp_path / "thinks"), *suites, *argv])["ecg-reasoning"]
    assert results["settings"]["generation"]["max_new_tokens"] == 48 + 3
    # refused before the first suite is asked
    argv += ["--metadata", str(place / "records.csv")]
    assert cli.main(["benchmark", str(tmp_path / "thinks"), *suites, "ptbxl", *argv]) == 1
    assert "thinks before it answers; leave the suite out" in capsys.readouterr().err
    assert not (tmp_path / "out" / "ptbxl").exists()


def test_the_revision_of_a_language_model(place, llm, monkeypatch):
    from elm_ecg.training.evaluation.benchmarks import contenders

    asked: dict[str, Any] = {}

    def build(name: str, **options: Any) -> None:
        asked.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(contenders, "new_elm", build)
    with pytest.raises(ValueError, match="seen"):
        command.main([*argv_of(place, llm, "ecg-qa"), "--describe", "--model_revision", "v2"])
    assert asked["revision"] == "v2"


def test_results_of_something_else_are_not_overwritten(run, place, elm, capsys):
    folder, _ = run
    argv = ["benchmark", *argv_of(place, elm, "ecg-qa"), "--output_dir", str(folder), "--limit", "3"]
    assert cli.main(argv) == 1
    assert "holds the results of another model, data or settings in ecg-qa" in capsys.readouterr().err


def test_questions_that_do_not_fit_count_as_wrong(place, elm, tmp_path, monkeypatch, caplog):
    from elm_ecg.training.evaluation.benchmarks import contenders

    load = contenders.load_elm

    def load_small(*args: Any, **kwargs: Any) -> Any:
        model, processor = load(*args, **kwargs)
        processor.max_length = 330  # the first question of a chain fits
        return model, processor

    monkeypatch.setattr(contenders, "load_elm", load_small)
    argv = [*argv_of(place, elm, "ecg-reasoning"), "--conditions", "ecg", "--output_dir", str(tmp_path)]
    results = command.main(argv)["ecg-reasoning"]
    empty = [row for row in results.predictions if not row["ecg"]]
    too_long = results["suite"]["left_out"]["questions too long for the model's context, which count as wrong"]
    assert 0 < len(empty) == too_long < results["num_questions"]
    assert "too long for the model's context" in caplog.text
    assert all(np.sum([score[0] for score in row["suite"].values()]) == 0 for row in empty)
