"""`elm chat --server` and `elm demo --server`: a model behind an address answers as the same model here."""

import copy
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training import cli
from elm_ecg.training.apps import demo as demo_module
from elm_ecg.training.apps.chat import Chat, ServedChat
from elm_ecg.training.apps.demo import Page, ServedPage, example_files
from elm_ecg.training.apps.served import ServedModel, read_to_send
from elm_ecg.training.serving import serve
from helpers import free_port, save_record, tiny_elm_config, tiny_llm_config, tiny_processor

KEY = "let-me-in"


class Running:
    """`elm serve` of a model in a thread, and the same model here."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.processor = tiny_processor("default", truncation="start")
        llm = tiny_llm_config("default", len(self.processor.tokenizer), initializer_range=0.3, eos_token_id=1)
        torch.manual_seed(0)
        config = tiny_elm_config(llm=llm, ecg_token_id=self.processor.ecg_token_id)
        self.model = ELMForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in self.model.model.connector.parameters():
                parameter.normal_(std=0.5)
        self.model.save_pretrained(folder / "tiny")
        self.processor.save_pretrained(folder / "tiny")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = serve.make_server(serve.parse([str(folder / "tiny"), *options]))
        self.thread = Thread(target=serve.run, args=(self.server, self.listener))

    def __enter__(self) -> "Running":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.is_ending = True
        self.thread.join()
        self.listener.close()

    def here(self) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
        return copy.deepcopy(self.model), self.processor


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("served"), "--api_key", KEY, "--max_new_tokens", "600") as running:
        yield running


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("records")
    few = [lead for lead in STANDARD_LEADS if lead not in ("III", "aVF")]
    return [save_record(folder / "one.npz"), save_record(folder / "long.npz", seconds=12.0, leads=few, seed=1)]


@pytest.fixture
def served(running) -> ServedModel:
    return ServedModel(running.url, api_key=KEY)


LINES = ["What is it?", "/ecg {0}", "Why?", "/ecg {1} --start 1.5", "And this?", "So?"]


def say(chat: Chat, records: list[Path]) -> list[str]:
    """The answers to `LINES`."""
    answers = []
    for line in LINES:
        if line.startswith("/"):
            chat.command(line.format(*records))
        else:
            list(chat.ask(line))
            answers.append(chat.messages[-1]["content"][0]["text"])
    return answers


def test_a_served_chat_answers_as_one_here(running, served, records, capsys):
    here = Chat(*running.here(), "tiny", max_new_tokens=6)
    there = ServedChat(served, max_new_tokens=6)
    answers = say(there, records)
    assert "one.npz: all 12 leads, 500 Hz, 2 s. Noisy: I, II" in capsys.readouterr().out
    assert answers == say(here, records)
    assert len(set(answers)) == len(answers)
    assert there.row()["messages"] == here.row()["messages"]
    lengths = [len(ecg["array"][0]) for ecg in there.row()["ecg"]][:2]
    assert lengths == [1000, 5250]  # all that the model may have read


def test_the_server_tells_of_its_ecgs_once(running, served, records):
    chat = ServedChat(served, max_new_tokens=4)
    chat.command(f"/ecg {records[1]}")
    said = ["".join(chat.ask(question)) for question in ("Why?", "And?")]
    notice = "(Longer than the 2 s that the model reads: a part of it is cut off.)"
    assert [notice in text for text in said] == [True, False]
    assert notice not in json.dumps(chat.row()["messages"])


def test_commands_of_a_served_chat(served, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = ServedChat(served, system_prompt="Be brief.", max_new_tokens=4)
    chat.command(f"/ecg {records[0]}")
    list(chat.ask("Why?"))
    chat.command("/plot one.svg")
    chat.command("/save chat.json")
    assert "<svg" in (tmp_path / "one.svg").read_text()
    row = json.loads((tmp_path / "chat.json").read_text())
    assert row["messages"][0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert (row["model"], len(row["ecg"][0]["array"])) == ("tiny", 12)
    with pytest.raises(ValueError, match=r"^/why needs the model here: ask it with `elm chat MODEL`"):
        chat.command("/why")
    with pytest.raises(ValueError, match="start is 2; the record lasts 2 s"):
        chat.command(f"/ecg {records[0]} --start 2")


def test_nothing_but_the_signal_is_sent(served, tmp_path, monkeypatch):
    """Not the name of the file, nor what it says of the patient."""
    path = tmp_path / "Jane_Doe.npz"
    np.savez(path, array=np.ones((12, 1000), np.float32), sampling_rate=500, unit="mV", patient="Jane Doe")
    sent = []
    stream = served._client.stream
    monkeypatch.setattr(
        served._client, "stream", lambda *args, **kwargs: sent.append(kwargs["json"]) or stream(*args, **kwargs)
    )
    chat = ServedChat(served, max_new_tokens=2)
    chat.command(f"/ecg {path}")
    list(chat.ask("Why?"))
    (ecg,) = [part["ecg"] for part in sent[0]["messages"][0]["content"] if part["type"] == "ecg"]
    assert set(ecg) == {"data", "format"}
    assert "Jane" not in json.dumps(sent)


def test_closing_an_answer_frees_its_place(running, served):
    chat = ServedChat(served, max_new_tokens=600)
    answer = chat.ask("Why?")
    next(answer)
    assert running.server.running == 1
    answer.close()
    deadline = time.monotonic() + 10
    while running.server.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.server.running == 0
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_seeds_and_temperature(served):
    def drawn(seed: int) -> str:
        chat = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
        return "".join(served.answer(chat, max_new_tokens=8, temperature=2.0, seed=seed))

    assert drawn(1) == drawn(1) != drawn(2)


def chat_command(*options: str, capsys: Any) -> str:
    assert cli.main(["chat", *options]) == 1
    return capsys.readouterr().err


def test_what_is_told_of_faults(running, served, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("ELM_API_KEY", raising=False)
    nobody = f"http://127.0.0.1:{free_port()}"
    for options, told in (
        (["--server", nobody], f"elm chat: --server {nobody} does not answer ("),
        (["--server", "nowhere"], "elm chat: --server nowhere cannot be asked: UnsupportedProtocol"),
        (["--server", running.url], "There is no such API key; send it as"),
        (["--server", running.url, "--api_key", "no"], "Give it with --api_key, or as ELM_API_KEY in the environment."),
        (["other", "--server", running.url, "--api_key", KEY], "has no model other; it has tiny."),
        (["--server", running.url, "--dtype", "float16"], "--dtype is of a model that is loaded here"),
        (["tiny", "--api_key", "x"], "--api_key is of a server; add --server"),
        (["--seed", "1"], "MODEL is missing; name a saved ELM, or a server with --server."),
    ):
        assert told in chat_command(*options, capsys=capsys)
    with pytest.raises(ValueError, match=r"^The server: max_tokens is 601; this server writes at most 600 tokens"):
        list(ServedChat(served, max_new_tokens=601).ask("Why?"))
    monkeypatch.setattr(running.server, "max_queue", 0)
    with pytest.raises(ValueError, match=r"^The server: 0 chats wait .* \(Ask again in \d+ s\.\)$"):
        list(ServedChat(served, max_new_tokens=2).ask("Why?"))
    monkeypatch.setattr(running.server, "is_ending", True)
    monkeypatch.setattr(running.server, "waiting", 1)  # so that it goes on
    with pytest.raises(ValueError, match=r"^The server: The server is ending; ask again later\. \(Ask again in 5 s"):
        list(ServedChat(served, max_new_tokens=2).ask("Why?"))


def test_a_page_of_another_kind(tmp_path, capsys):
    from loopback_hub import LoopbackHub

    with LoopbackHub() as hub:
        assert f"--server {hub.url} is no server of `elm serve`: it answers with status" in chat_command(
            "--server", hub.url, capsys=capsys
        )


def test_the_command(running, monkeypatch, capsys):
    monkeypatch.setenv("ELM_API_KEY", KEY)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    lines = iter(["Why?"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError()))
    assert cli.main(["chat", "--server", f"{running.url}/v1", "--max_new_tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"tiny at {running.url}. /help lists the commands.\nResearch software")
    expected = "".join(Chat(*running.here(), "tiny", max_new_tokens=3).ask("Why?"))
    assert expected in out


def test_a_served_page_answers_as_one_here(running, served, records):
    examples = example_files(records)
    here = Page(*running.here(), examples, max_new_tokens=5)
    there = ServedPage(served, examples, max_new_tokens=5)
    found = []
    for page in (here, there):
        ecgs, _ = page.pick("one")
        *_, (turns, compared) = page.ask("Why?", ecgs, [], True, [])
        found.append((turns, compared))
    assert found[0] == found[1]
    assert not there.explains
    ecgs, picture = there.upload([str(records[1])], start=3.0)
    assert "<svg" in picture
    assert ecgs[0].prepared.array.shape[1] == 9 * 500


@pytest.mark.slow
def test_the_command_of_the_page(running, records, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setenv("ELM_API_KEY", KEY)
    built = []

    def show(demo: Any, *_: object) -> str:
        built.append(demo)
        raise KeyboardInterrupt  # who has seen it ends it

    monkeypatch.setattr(demo_module, "serve", show)
    assert cli.main(["demo", "--server", running.url, "--records", str(records[0]), "--system_prompt", "Brief."]) == 130
    texts = [block.value for block in built[0].blocks.values() if isinstance(getattr(block, "value", None), str)]
    assert any("`tiny`" in text for text in texts)


def test_what_is_drawn_of_a_long_record(records):
    ecg = read_to_send(records[1])
    assert ecg.prepared.array.shape == (10, 5000)
    assert ecg.facts.startswith("leads I, II, aVR, aVL, V1, V2, V3, V4, V5, V6, 500 Hz, 12 s. Noisy: ")
    assert "The model reads" not in ecg.facts
