import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from ecg_files import write_wfdb

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training import cli
from elm_ecg.training.evaluation import evaluate, predict
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.load import load_elm
from helpers import (
    fork_project,
    fork_two,
    save_record,
    save_tiny_data,
    tiny_elm_config,
    tiny_llm_config,
    tiny_processor,
)

LAUNCHED = "import runpy\nrunpy.run_module('elm_ecg.training.evaluation.predict', run_name='__main__')"
QUESTIONS = ["What is the rhythm?", "Is the rate fast?", "Why?"]
FEW = ["--max_new_tokens", "6", "--batch_size", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random ELM whose answers depend on the ECG."""
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor("default", sampling_rate=100)
    torch.manual_seed(0)
    llm = tiny_llm_config("default", len(processor.tokenizer), initializer_range=0.3, eos_token_id=1)
    elm = ELMForConditionalGeneration(tiny_elm_config(llm=llm, ecg_token_id=processor.ecg_token_id, num_samples=500))
    with torch.no_grad():
        for parameter in elm.model.connector.parameters():
            parameter.normal_(std=0.5)
    elm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Twenty records, one of which is too long for the model, and a file that is none."""
    folder = tmp_path_factory.mktemp("records")
    for number in range(18):
        save_record(folder / f"{number:02}.npz", seconds=5.0, seed=number)
    save_record(folder / "18.npz", seconds=9.0)
    (folder / "19.npz").write_bytes(b"no ECG")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(predict, "BATCHES", 4)


def run(model: Path, folder: Path, *options: str, name: str = "answers.jsonl") -> Path:
    output = folder / name
    predict.main([str(model), *options, "--output", str(output)])
    return output


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def answered(model, records, tmp_path_factory) -> Path:
    return run(model, tmp_path_factory.mktemp("answered"), str(records), "--question", *QUESTIONS, *FEW)


def test_each_question_about_each_record(answered, model, records):
    """In order; with the answer that the pipeline gives to the question alone."""
    lines = lines_of(answered)
    assert [(line["record"], line["question"]) for line in lines] == [
        (f"{number:02}", question) for number in range(20) for question in QUESTIONS
    ]
    assert len({line["answer"] for line in lines[:54]}) > 9
    assert not any("answer" in line for line in lines[54:])
    assert all("5 s" in line["error"] and "truncation" in line["error"] for line in lines[54:57])
    assert all(str(records / "19.npz") in line["error"] for line in lines[57:])
    elm, processor = load_elm(str(model))
    for line in lines[:54:7]:
        ecg = {"type": "ecg", "path": str(records / f"{line['record']}.npz")}
        chat = [{"role": "user", "content": [ecg, {"type": "text", "text": line["question"]}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = elm.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert line["answer"] == processor.decode_answers(output[:, inputs["input_ids"].shape[1] :])[0]


def test_says_where_and_how_many(model, records, tmp_path, capsys):
    output = run(model, tmp_path, str(records), "--question", "Why?", *FEW)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("18 answers about 20 records; 2 lines without, as `error` there says: The ECG is 9 s long")
    assert told.endswith(f"In {output}")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_repeated(after, answered, model, records, tmp_path, monkeypatch):
    argv = (str(records), "--question", *QUESTIONS, *FEW)
    answer, number = Answerer.answer_batch, iter(range(100))

    def killed(self: Answerer, *args: Any) -> Any:
        if next(number) == 4 * after + 2:  # in the midst of a part
            raise KeyboardInterrupt
        return answer(self, *args)

    monkeypatch.setattr(Answerer, "answer_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, *argv)
    assert not (tmp_path / "answers.jsonl").exists()
    asked: list[int] = []
    monkeypatch.setattr(Answerer, "answer_batch", lambda self, *args: asked.append(args[2]) or answer(self, *args))
    assert run(model, tmp_path, *argv).read_bytes() == answered.read_bytes()
    assert min(asked) == 4 * after  # nothing of the finished parts
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_part_of_another_command_is_not_taken(model, records, tmp_path, monkeypatch):
    monkeypatch.setattr(predict.Parts, "finish", lambda *args: None)
    run(model, tmp_path, str(records), "--question", "Why?", *FEW)
    for options in (["--question", "Who?", *FEW], ["--question", "Why?", *FEW, "--seed", "1"]):
        with pytest.raises(ValueError, match="is what another command left unfinished"):
            run(model, tmp_path, str(records), *options)


def test_killed_when_all_was_answered(answered, model, records, tmp_path, monkeypatch):
    """Nothing is left to ask then, as of those processes that get no part of few rows."""
    argv = (str(records), "--question", *QUESTIONS, *FEW)
    with monkeypatch.context() as patched:
        patched.setattr(predict.Parts, "finish", lambda *args: None)
        run(model, tmp_path, *argv)
    assert run(model, tmp_path, *argv).read_bytes() == answered.read_bytes()


def test_signals_beside_a_header_count_to_its_record(model, tmp_path, monkeypatch):
    """Else a run that goes on keeps what was said of samples that were cut or not there, and are whole now."""
    lines = ["r 12 100 500", *(f"r.dat 16 1000/mV 16 0 0 0 0 {lead}" for lead in STANDARD_LEADS)]
    header = write_wfdb(tmp_path, lines, r=bytes(2 * 12 * 500))
    monkeypatch.setattr(predict.Parts, "finish", lambda *args: None)
    argv = (str(header), "--question", "Why?", *FEW)
    run(model, tmp_path, *argv)
    run(model, tmp_path, *argv)  # goes on
    write_wfdb(tmp_path, lines, r=bytes(2 * 12 * 400))
    with pytest.raises(ValueError, match="is what another command left unfinished"):
        run(model, tmp_path, *argv)


def test_a_damaged_header_is_the_error_of_its_record_alone(model, tmp_path):
    header = write_wfdb(tmp_path, ["r 1 100 500", "r\0.dat 16 1000/mV 16 0 0 0 0 I"])
    good = save_record(tmp_path / "good.npz", seconds=5.0)
    lines = lines_of(run(model, tmp_path, str(header), str(good), "--question", "Why?", *FEW))
    assert ["error" in line for line in lines] == [True, False]


@pytest.mark.slow
def test_two_processes_write_the_same_file(answered, model, records, tmp_path):
    code = (
        "from elm_ecg.training.evaluation import predict\npredict.BATCHES = 4\nimport sys\npredict.main(sys.argv[1:])"
    )
    output = tmp_path / "answers.jsonl"
    argv = [str(model), str(records), "--question", *QUESTIONS, *FEW, "--output", str(output)]
    for process in [fork.finish() for fork in fork_two(code, *argv)]:
        assert process.returncode == 0, process.stderr
    assert output.read_bytes() == answered.read_bytes()


def test_sampled_answers_are_the_same_again(model, records, tmp_path):
    argv = (str(records / "0*.npz"), "--question", "Why?", *FEW, "--generation_kwargs", '{"do_sample": true}')
    first = run(model, tmp_path, *argv, name="a.jsonl").read_bytes()
    assert run(model, tmp_path, *argv, name="b.jsonl").read_bytes() == first
    assert run(model, tmp_path, *argv, "--seed", "1", name="c.jsonl").read_bytes() != first


def test_candidates_share_one(model, records, tmp_path):
    names = ["yes", "no", "perhaps so"]
    argv = (str(records / "0*.npz"), "--question", *QUESTIONS, "--candidates", *names, "--batch_size", "2")
    lines = lines_of(run(model, tmp_path, *argv))
    assert len(lines) == 30
    for line in lines:
        assert list(line["shares"]) == names
        assert sum(line["shares"].values()) == pytest.approx(1)
        assert line["answer"] == max(line["shares"], key=line["shares"].get)
    with run(model, tmp_path, *argv, name="a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["share of perhaps so"]) for row in rows] == [line["shares"]["perhaps so"] for line in lines]
    assert list(rows[0]) == [
        "record",
        "question",
        "answer",
        *(f"share of {name}" for name in names),
        "notices",
        "error",
    ]


def test_notices_stand_in_the_lines_and_are_told_once(model, tmp_path, caplog):
    told = "Shorter than the 5 s that the model reads."
    for number in range(2):
        save_record(tmp_path / f"short{number}.npz", seconds=3.0)
    lines = lines_of(run(model, tmp_path, str(tmp_path / "*.npz"), "--question", "Why?", "Who?", *FEW))
    assert [line["notices"] for line in lines] == [[told]] * 4
    messages = [record.getMessage() for record in caplog.records if record.name == predict.__name__]
    assert messages == [f"{told} (4 lines)"]


def test_a_part_of_a_longer_record(model, records, tmp_path):
    long = str(records / "18.npz")
    for part, start in (("start", 0), ("end", 400)):
        cut = save_record(tmp_path / f"{part}.npz", seconds=9.0)
        stored = dict(np.load(long))
        np.savez(cut, **{**stored, "array": stored["array"][:, 5 * start : 5 * start + 2500]})
        options = ["--question", "Why?", *FEW]
        (whole,) = lines_of(run(model, tmp_path, long, *options, "--truncation", part, name=f"{part}.jsonl"))
        (alone,) = lines_of(run(model, tmp_path, str(cut), *options, name=f"{part}_alone.jsonl"))
        assert whole["answer"] == alone["answer"]


def test_a_table_asks_about_its_records(model, records, tmp_path):
    table = tmp_path / "questions.csv"
    table.write_text("record,question\n03,Why?\n00.npz,Who?\n03,Who?\n")
    lines = lines_of(run(model, tmp_path, str(records), "--questions", str(table), *FEW))
    assert [(line["record"], line["question"]) for line in lines] == [("03", "Why?"), ("00", "Who?"), ("03", "Who?")]
    table.write_text("record,question\n03,Why?\n77,Who?\n")
    with pytest.raises(ValueError, match="names 1 record that is not among the 20 given, such as '77'"):
        run(model, tmp_path, str(records), "--questions", str(table), *FEW, name="b.jsonl")
    table.write_text("record,question\n03,\n")
    with pytest.raises(ValueError, match=r"Row 1 of .* has an empty question"):
        run(model, tmp_path, str(records), "--questions", str(table), *FEW, name="b.jsonl")


def test_a_text_file_of_questions(model, records, tmp_path):
    (tmp_path / "q.txt").write_text("Why?\n\n  Who?\n")
    lines = lines_of(run(model, tmp_path, str(records / "00.npz"), "--questions", str(tmp_path / "q.txt"), *FEW))
    assert [line["question"] for line in lines] == ["Why?", "Who?"]


def test_files_of_one_name_go_by_their_paths(model, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_record(tmp_path / folder / "1.npz", seconds=5.0)
    lines = lines_of(run(model, tmp_path, str(tmp_path / "a"), str(tmp_path / "b"), "--question", "Why?", *FEW))
    assert [line["record"] for line in lines] == [str(tmp_path / folder / "1.npz") for folder in ("a", "b")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "data", train=1, test=6)


@pytest.mark.slow
def test_the_questions_of_a_dataset(model, data, tmp_path, monkeypatch):
    """As `elm evaluate` asks them: behind the right answers to those before."""
    monkeypatch.setattr(evaluate, "write_report", lambda *args, **options: None)
    lines = lines_of(run(model, tmp_path, "--data", str(data), *FEW))
    options = ["--conditions", "ecg", "--num_resamples", "1", "--output_dir", str(tmp_path / "evaluated"), *FEW]
    results = evaluate.main(["--model_name_or_path", str(model), "--data", str(data), *options])
    assert [line["answer"] for line in lines] == [row["ecg"] for row in results.predictions]
    assert [line["question"] for line in lines] == [row["question"] for row in results.predictions]
    assert [line["record"] for line in lines] == [row["record_id"] for row in results.predictions]


def test_questions_about_the_records_of_a_dataset(model, data, tmp_path):
    lines = lines_of(run(model, tmp_path, "--data", str(data), "--question", *QUESTIONS, *FEW))
    ids = load_from_disk(str(data))["test"]["record_id"]
    assert [(line["record"], line["question"]) for line in lines] == [(r, q) for r in ids for q in QUESTIONS]


def test_features(model, records, tmp_path):
    elm, processor = load_elm(str(model))
    inputs = processor.feature_extractor(str(records / "03.npz"), return_tensors="pt")
    with torch.inference_mode():
        expected = {
            "encoder": elm.model.get_encoder_features(**inputs).mean(1)[0],
            "connector": elm.get_ecg_features(**inputs).mean(1)[0],
        }
    for kind, vector in expected.items():
        with np.load(run(model, tmp_path, str(records), "--features", kind, *FEW[2:], name=f"{kind}.npz")) as content:
            assert content["record"].tolist() == [f"{number:02}" for number in range(20)]
            assert content["features"].dtype == np.float32
            np.testing.assert_allclose(content["features"][3], vector, rtol=1e-4, atol=1e-5)
            assert np.isnan(content["features"]).all(1).tolist() == [False] * 18 + [True] * 2
            assert [bool(text) for text in content["error"]] == [False] * 18 + [True] * 2
    table = pq.read_table(run(model, tmp_path, str(records), "--features", "encoder", *FEW[2:], name="e.parquet"))
    np.testing.assert_allclose(table["features"][3].as_py(), expected["encoder"], rtol=1e-4, atol=1e-5)
    assert table["features"][19].as_py() is None


def test_features_of_the_language_model_are_of_a_question(model, records, tmp_path):
    """What it holds at the last token of the prompt: it does not depend on what stands beside it in the batch."""
    options = (str(records / "0*.npz"), "--features", "llm", "--question", *QUESTIONS)
    with np.load(run(model, tmp_path, *options, "--batch_size", "7", name="a.npz")) as content:
        features, questions = content["features"], content["question"].tolist()
    assert questions[:3] == QUESTIONS
    with np.load(run(model, tmp_path, *options, "--batch_size", "1", name="b.npz")) as content:
        np.testing.assert_allclose(content["features"], features, rtol=1e-4, atol=1e-4)
    assert len(np.unique(features.round(4), axis=0)) == 30


def test_records_stand_anywhere(tmp_path):
    for argv in (
        ["m", "a.npz", "b", "--seed", "1"],
        ["m", "--seed", "1", "a.npz", "b"],
        ["--seed", "1", "m", "a.npz", "b"],
    ):
        args = predict.parse([*argv, "--question", "Why?", "--output", str(tmp_path / "a.csv")])
        assert (args.model, args.records, args.seed) == ("m", ["a.npz", "b"], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x.npz"], "What is asked"),
        (["--question", "Why?"], "Which ECGs"),
        (["x.npz", "--data", "d", "--question", "Why?"], "not both"),
        (["x.npz", "--question", "Why?", "--questions", "q.txt"], "two ways"),
        (["x.npz", "--question", " "], "--question has an empty text"),
        (["x.npz", "--question", "Why?", "--split", "test"], "--split changes nothing without --data"),
        (["--data", "d", "--unit", "uV"], "--unit changes nothing without RECORD"),
        (["x.npz", "--question", "Why?", "--candidates", "yes", "yes"], "at least two different"),
        (["x.npz", "--question", "Why?", "--candidates", "a", "b", "--generation_kwargs", '{"top_k": 2}'], "nothing"),
        (
            ["x.npz", "--question", "Why?", "--candidates", "a", "b", "--max_new_tokens", "4"],
            "nothing with --candidates",
        ),
        (["x.npz", "--features", "encoder", "--max_new_tokens", "4"], "--max_new_tokens changes nothing"),
        (["x.npz", "--questions", "nope.csv"], "--questions nope.csv: there is no such file"),
        (["x.npz", "--question", "Why?", "--generation_kwargs", '{"max_length": 2}'], "has max_length; expected"),
        (
            ["x.npz", "--question", "Why?", "--generation_kwargs", '{"min_new_tokens": 129}'],
            "min_new_tokens is 129, above --max_new_tokens 128",
        ),
        (["x.npz", "--question", "Why?", "--output", "a.txt"], "ends with .jsonl or .csv"),
        (["x.npz", "--question", "Why?", "--output", "no/a.csv"], "there is no folder no"),
        (["x.npz", "--question", "Why?", "--seed", "-1"], "at least 0"),
        (["x.npz", "--question", "Why?", "--features", "encoder"], "reads no question"),
        (["x.npz", "--features", "llm"], "What is asked"),
        (["x.npz", "--features", "encoder", "--candidates", "a", "b"], "changes nothing with --features"),
        (["x.npz", "--features", "encoder", "--output", "a.csv"], "ends with .npz or .parquet"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        predict.main(["model", *options])


def test_a_file_that_is_there_is_not_overwritten(answered, model, records, capsys):
    before = answered.read_bytes()
    argv = ["predict", str(model), str(records), "--question", "Why?", "--output", str(answered)]
    assert cli.main(argv) == 1
    assert "is there already; name another file, or move it away" in capsys.readouterr().err
    assert answered.read_bytes() == before


def test_candidates_of_a_model_that_thinks(model, tmp_path):
    processor = ELMProcessor.from_pretrained(model)
    processor.explicit_thinking = True
    shutil.copytree(model, tmp_path / "thinks")
    processor.save_pretrained(tmp_path / "thinks")
    record = save_record(tmp_path / "a.npz", seconds=5.0)
    with pytest.raises(ValueError, match="--candidates 'no' does not begin with <think>"):
        run(tmp_path / "thinks", tmp_path, str(record), "--question", "Why?", "--candidates", "no", "yes")


def test_no_record_can_be_read(model, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no ECG")
    with pytest.raises(
        ValueError, match=r"no answer about any of 1 record, .* the first error: .*a\.npz is of no known"
    ):
        run(model, tmp_path, str(tmp_path / "a.npz"), "--question", "Why?")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    with pytest.raises(ValueError, match="No file is named as"):
        run(model, tmp_path, str(tmp_path / "x*.npz"), "--question", "Why?")
    with pytest.raises(ValueError, match=r"There is no file or folder .*x\.xml"):
        run(model, tmp_path, str(tmp_path / "x.xml"), "--question", "Why?")


@pytest.mark.slow
def test_a_launcher_sees_one_line_too(tmp_path):
    process = fork_project(LAUNCHED, "model", "x.npz", "--question", "Why?", "--output", "no/a.csv").finish()
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "elm predict: --output is no/a.csv; there is no folder no."


def test_real_recordings(model, shared, tmp_path):
    files = sorted((shared / "data/ptbxl/wfdb_examples/records100").rglob("*.hea"))[:3]
    names = [str(file.with_suffix("")) for file in files]  # as WFDB has it
    short = save_record(tmp_path / "short.npz", seconds=5.0)
    lines = lines_of(run(model, tmp_path, str(short), *names, "--question", "Why?", *FEW))
    assert [line["record"] for line in lines] == ["short", *(Path(name).name for name in names)]
    assert all("The ECG is 10 s long" in line["error"] for line in lines[1:])
