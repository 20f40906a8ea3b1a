import json
from pathlib import Path

import pytest

from elm_ecg.training import cli
from elm_ecg.training.evaluation.benchmarks import command
from elm_ecg.training.evaluation.benchmarks.chats import Turn
from elm_ecg.training.evaluation.benchmarks.ecg_grounding import ECGGrounding
from elm_ecg.training.evaluation.benchmarks.ecgbench import ECGBench
from elm_ecg.training.evaluation.benchmarks.endpoint import Endpoint
from elm_ecg.training.evaluation.benchmarks.judge import Judge
from helpers import save_record

BENCH = ECGBench()
REPORT = Turn("Write a report.", "Sinus rhythm. Normal ECG.", "ptb-test-report")
MARKS = {"Sinus rhythm.": (10, 10, 4), "Asystole.": (0, 3, 0)}  # rhythm, waveform, diagnosis


def judge_at(endpoint: Endpoint, file: Path) -> Judge:
    assert BENCH.judge_prompt is not None
    return Judge(endpoint, file, BENCH.judge_prompt, BENCH.is_judged, BENCH.judged_share)


def text_of(body: dict) -> str:
    return body["messages"][0]["content"][0]["text"]


def marked(body: dict) -> str:
    """A judge who knows two reports, and chats round its JSON."""
    said = text_of(body).rpartition("The text to judge:\n")[2]
    if said not in MARKS:
        return "I would rather not."
    return (
        f"Sure:\n```json\n{json.dumps(dict(zip(('rhythm', 'waveform', 'diagnosis'), MARKS[said], strict=True)))}\n```"
    )


def test_scores_of_a_judge(server, tmp_path, monkeypatch):
    """What is asked, what becomes of it, and that nothing is asked twice."""
    server.reply = marked
    monkeypatch.setenv("ELM_JUDGE_API_KEY", "a-key")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    endpoint = Endpoint(server.url, "judge", "judge_url", "ELM_JUDGE_API_KEY")
    judge = judge_at(endpoint, tmp_path / "judge.jsonl")
    turns = [REPORT, REPORT, Turn("NORM or MI?", "NORM", "ptb-test"), REPORT, REPORT, REPORT]
    answers = ["Sinus rhythm.", "Asystole.", "NORM", " ", "{}", "Asystole."]
    points = judge.points(turns, answers)
    assert points.tolist() == [[0.8, 1], [0.1, 1], [0, 0], [0, 1], [0, 0], [0.1, 1]]
    assert judge.as_json()["replies_without_a_score"] == 1
    assert sorted(map(text_of, server.asked)) == sorted(
        {judge.prompt_of(REPORT, answers[place]) for place in (0, 1, 4)}
    )
    assert "right text:\nSinus rhythm. Normal ECG.\n" in text_of(server.asked[0])
    assert {(body["key"], body["model"], body["temperature"]) for body in server.asked} == {
        ("Bearer a-key", "judge", 0)
    }
    with judge.file.open("a") as file:
        file.write('\n{"key": "cut off')
    again = judge_at(endpoint, judge.file)
    assert again.points(turns, answers).tolist() == points.tolist()
    assert len(server.asked) == 3
    assert again.points([REPORT], ["Sinus rhythm!"]).tolist() == [[0, 0]]
    assert len(server.asked) == 4  # kept behind the line that was cut
    assert judge_at(endpoint, judge.file).points([REPORT], ["Sinus rhythm!"]).tolist() == [[0, 0]]
    assert len(server.asked) == 4
    judge_at(Endpoint(server.url, "other"), judge.file).points([REPORT], ["Asystole."])
    assert len(server.asked) == 5  # another judge's reply is not taken


@pytest.mark.parametrize(
    ("suite", "said", "share"),
    [
        (BENCH, {"rhythm": 10, "waveform": 5, "diagnosis": 0}, 0.5),
        (BENCH, {"rhythm": 10, "waveform": 5}, None),
        (BENCH, {"rhythm": 11, "waveform": 5, "diagnosis": 0}, None),
        (BENCH, {"rhythm": True, "waveform": 5, "diagnosis": 0}, None),
        (ECGGrounding(), {"diagnoses": [{"score": 2}, {"score": 1}, {"score": 0}, {"score": 2}]}, 0.625),
        (ECGGrounding(), {"diagnoses": []}, None),
        (ECGGrounding(), {"diagnoses": [{"score": 2}, "AF"]}, None),
        (ECGGrounding(), {"diagnoses": [{"score": 3}]}, None),
        (ECGGrounding(), {"diagnoses": "AF"}, None),
    ],
)
def test_what_a_judge_may_say(suite, said, share):
    assert suite.judged_share(said) == share


@pytest.fixture
def place(tmp_path) -> Path:
    rows = []
    (tmp_path / "ecgs").mkdir()
    for number in range(1, 11):
        save_record(tmp_path / "ecgs" / f"{number:05d}_hr.npz", seed=number)
        talk = [{"from": "human", "value": "<image>\nInterpret."}, {"from": "gpt", "value": "Sinus rhythm."}]
        rows.append({"id": str(number), "ecg": f"ptbxl/records500/00000/{number:05d}_hr", "conversations": talk})
    (tmp_path / "ecg-grounding-test.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_run_with_a_judge(place, server, monkeypatch, caplog):
    """The model and its judge at one address: half of its interpretations are right, and one reply has no score."""
    monkeypatch.setattr(command, "write_report", lambda *args: None)

    def reply(body: dict) -> str:
        if body["model"] == "elm":
            return f"Sinus rhythm {sum(one['model'] == 'elm' for one in server.asked)}"
        number = int(text_of(body).rpartition(" ")[2])
        return "No." if number == 1 else json.dumps({"diagnoses": [{"diagnosis": "SR", "score": 2 * (number % 2)}]})

    server.reply = reply
    argv = [
        "elm",
        "--endpoint",
        server.url,
        "--describe",
        "--suite",
        f"ecg-grounding={place}",
        "--records",
        str(place / "ecgs"),
    ]
    argv += ["--conditions", "ecg", "--num_resamples", "20", "--batch_size", "1", "--output_dir", str(place / "out")]
    results = command.main([*argv, "--judge_url", server.url, "--judge_model", "judge"])["ecg-grounding"]
    judged = results["conditions"]["ecg"]["metrics"]["diagnosis_accuracy"]
    assert judged["value"] == pytest.approx(4 / 9)
    assert results["suite"]["judge"]["model"] == "judge"
    assert results["suite"]["judge"]["prompt"] == ECGGrounding.judge_prompt
    assert results["suite"]["judge"]["replies_without_a_score"] == 1
    assert "1 replies of the judge have no score" in caplog.text
    table = (place / "out" / "ecg-grounding" / "table.md").read_text()
    assert "Judged by judge." in table
    assert "diagnosis accuracy, judged" in table
    assert "diagnosis_accuracy" in results.predictions[1]["suite"]
    assert "diagnosis_accuracy" not in results.predictions[0]["suite"]


def test_wrong_options_of_a_judge(place, capsys):
    argv = ["benchmark", "m", "--endpoint", "http://127.0.0.1:9/v1", "--records", str(place / "ecgs"), "--suite"]
    for options, message in (
        (
            [f"ecg-grounding={place}", "--judge_url", "http://127.0.0.1:9/v1"],
            "--judge_url and --judge_model go together",
        ),
        (
            [f"ecg-grounding={place}", "--judge_url", "nowhere", "--judge_model", "j"],
            "--judge_url is nowhere; expected an",
        ),
        ([f"ecg-qa={place}", "--judge_url", "http://a", "--judge_model", "j"], "of ecg-qa nothing is judged"),
    ):
        assert cli.main([*argv, *options]) == 1
        assert message in capsys.readouterr().err
