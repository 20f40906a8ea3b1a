import gc
import html
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from peft import LoraConfig, get_peft_model

from asking import REPRESENTATIONS, as_data, chats, make, predicted, turn
from elm_ecg.training.evaluation import predict
from elm_ecg.training.load import load_elm
from elm_ecg.training.serving import serve
from elm_ecg.training.serving.app import Server
from elm_ecg.training.serving.models import find_places, load_places
from elm_ecg.training.serving.serve import log_handler, make_server, parse, run
from forks import Fork
from helpers import fork_project, free_port, save_record

MAIN = "import sys\nfrom elm_ecg.training import cli\nsys.exit(cli.main(['serve', *sys.argv[1:]]))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved ELM, and two LoRA adapters of it that answer otherwise."""
    model, processor = make()
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for name in ("first", "second"):
        base, _ = load_elm(str(folder / "base"))
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["connector"])
        adapted = get_peft_model(base, lora)
        torch.manual_seed(len(name))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.5)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    return save_record(tmp_path_factory.mktemp("record") / "a.npz", seed=3)


def expected(model: Path, record: Path, folder: Path) -> str:
    """What `elm predict` writes."""
    output = folder / f"{model.name}.jsonl"
    predict.main([str(model), str(record), "--question", "Why?", "--max_new_tokens", "12", "--output", str(output)])
    return json.loads(output.read_text())["answer"]


class Process:
    """`elm serve` in a process of its own."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.fork: Fork = fork_project(MAIN, *options, "--port", self.port)
        for _ in range(3000):
            try:
                if httpx2.get(f"{self.url}/health").is_success:
                    break
            except httpx2.TransportError:
                time.sleep(0.1)
        import openai  # late, as the other tests have no need of it

        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0)


@pytest.mark.slow
def test_officially(folder, record, tmp_path):
    """The official client, curl's way and a client that goes away, of a base and its adapters; then SIGTERM ends what runs."""
    import openai

    models = [str(folder / name) for name in ("base", "first", "second")]
    key = tmp_path / "key"
    key.write_text("key\n")
    process = Process(*models, "--api_key_file", str(key), "--max_batch_size", "2")
    try:
        ask = {"messages": [turn(as_data(record), "Why?")], "max_tokens": 12}
        answers = {}
        for name in ("base", "first", "second"):
            completion = process.client.chat.completions.create(model=name, **ask)
            answers[name] = completion.choices[0].message.content
            chunks = process.client.chat.completions.create(model=name, stream=True, **ask)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answers[name]
            assert answers[name] == expected(folder / name, record, tmp_path)
        assert len(set(answers.values())) == 3
        assert {model.id for model in process.client.models.list()} == set(answers)
        with pytest.raises(openai.BadRequestError, match="of no known format"):
            process.client.chat.completions.create(
                model="base", messages=[turn({"type": "ecg", "ecg": {"data": "YWJj"}})]
            )
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{process.url}/v1", api_key="other", max_retries=0).models.list()

        for streams in (True, False) * 2:  # more than may be answered at once
            asked = {"model": "base", "messages": [turn("Write!")], "max_tokens": 500, "stream": streams}
            body = json.dumps(asked).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{process.port}\r\nauthorization: Bearer key\r\n"
            )
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", int(process.port))) as gone:
                gone.sendall(head.encode() + body)
                assert not streams or b" 200 " in gone.recv(100)
        assert process.client.chat.completions.create(model="base", **ask).choices[0].message.content == answers["base"]

        stream = process.client.chat.completions.create(
            model="base", messages=[turn("Write!")], max_tokens=500, stream=True
        )
        next(stream)
        os.kill(process.fork.pid, signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
    finally:
        os.kill(process.fork.pid, signal.SIGTERM)
    assert process.fork.finish().returncode == 0


@pytest.fixture
def page(tmp_path):
    """Address of a page in a browser that asks what is in `ask.json` beside it, and shows the answer."""
    script = """<p id="answer"></p><script>
        fetch("ask.json").then(answer => answer.json()).then(({url, body}) =>
            fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)})
        ).then(answer => answer.json()).then(
            answer => document.getElementById("answer").textContent = answer.choices[0].message.content,
            error => document.getElementById("answer").textContent = `${error}`)
    </script>"""
    (tmp_path / "page.html").write_text(f'<!doctype html><meta charset="utf-8">{script}')
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.minutes
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("curl"), reason="needs chromium and curl")
def test_every_client_among_fifty(tmp_path, page):
    """The official client, curl and a page get what `elm predict` writes, while fifty others ask four models of all representations."""
    names, requests = [], []
    for representation in REPRESENTATIONS:
        model, processor = make(representation)
        model.save_pretrained(tmp_path / representation)
        processor.save_pretrained(tmp_path / representation)
        names.append(f"{representation}={tmp_path / representation}")
        asked = chats(2.0 if representation == "signal" else 5.0)
        found = predicted(model, processor, asked, 8)
        requests += [
            ({"model": representation, "messages": chat, "max_tokens": 8}, answer)
            for chat, answer in zip(asked, found, strict=True)
        ]
    process, ended, wrong = Process(*names, "--cors_origins", page), threading.Event(), []

    def ask_on(number: int) -> int:
        order, count = random.Random(number), 0
        with httpx2.Client(timeout=300) as client:
            while not ended.is_set():
                body, answer = order.choice(requests)
                response = client.post(f"{process.url}/v1/chat/completions", json=body)
                if response.status_code != 200 or response.json()["choices"][0]["message"]["content"] != answer:
                    wrong.append(response.text)
                count += 1
        return count

    try:
        with ThreadPoolExecutor(50) as others:
            counts = [others.submit(ask_on, number) for number in range(50)]
            try:
                for body, answer in requests:
                    completion = process.client.chat.completions.create(**body)
                    assert completion.choices[0].message.content == answer
                    (tmp_path / "body.json").write_text(json.dumps(body))
                    curl = ["curl", "--silent", "--fail", "--json", f"@{tmp_path / 'body.json'}"]
                    said = subprocess.check_output([*curl, f"{process.url}/v1/chat/completions"])
                    assert json.loads(said)["choices"][0]["message"]["content"] == answer
                for body, answer in requests[::6]:  # one of each representation
                    ask = {"url": f"{process.url}/v1/chat/completions", "body": body}
                    (tmp_path / "ask.json").write_text(json.dumps(ask))
                    chromium = ["chromium", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"]
                    chromium += ["--virtual-time-budget=60000", "--dump-dom", f"{page}/page.html"]
                    shown = subprocess.check_output(chromium, stderr=subprocess.DEVNULL, timeout=300).decode()
                    assert html.unescape(shown.split('id="answer">')[1].split("</p>")[0]) == answer
            finally:
                ended.set()
            assert sum(count.result() for count in counts) >= 50
        assert not wrong
    finally:
        os.kill(process.fork.pid, signal.SIGTERM)
    assert process.fork.finish().returncode == 0


def test_adapters_share_the_weights_of_their_base(folder):
    places = find_places([str(folder / "first"), f"other={folder / 'second'}"], "main", False)
    (loaded,) = load_places(places, False)
    assert list(loaded.processors) == ["first", "other"]
    base, _ = load_elm(str(folder / "base"))
    weights = dict(loaded.model.named_parameters())
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[name], dict(base.named_parameters())[name])
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) < 2 * base.num_parameters()
    (alone,) = load_places(places[:1], False)
    assert alone.adapters is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask: give --api_key_file"),
        (["--port", "70000"], "--port is 70000"),
        (["--engine", "vllm"], "--engine vllm and --engine_url URL go together"),
        (["--engine_model", "a"], "--engine_model changes nothing without --engine vllm"),
    ],
)
def test_options_that_do_not_go(options, expected, monkeypatch):
    monkeypatch.delenv("ELM_API_KEY", raising=False)
    with pytest.raises(ValueError, match=expected):
        parse(["model", *options])


def test_nothing_stays_frozen_at_the_end(monkeypatch):
    """Libraries would tell of it, as of what they have leaked."""
    done = []
    monkeypatch.setattr(serve, "gc", SimpleNamespace(**{name: partial(done.append, name) for name in dir(gc)}))
    monkeypatch.setattr(serve, "make_server", lambda args: SimpleNamespace(models=[]))
    monkeypatch.setattr(serve, "run", lambda *args: [done.append("run"), os.listdir("/nowhere")])
    with pytest.raises(FileNotFoundError):
        serve.main(["model", "--port", "0"])
    assert done == ["collect", "freeze", "run", "unfreeze"]


def test_the_log_is_the_servers_own():
    """pydicom logs values of a file that it does not like, such as a name."""
    told = [
        name for name in ("elm_ecg.training", "uvicorn.error", "pydicom", "wfdb") if log_handler().filter(log_of(name))
    ]
    assert told == ["elm_ecg.training", "uvicorn.error"]


def log_of(name: str) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "", 0, "'Doe^John'", None, None)


def test_connections_that_ask_nothing_are_closed(monkeypatch):
    """One that never ends the head of its request, and not one that asks again and again."""
    monkeypatch.setattr("elm_ecg.training.serving.serve.SECONDS_TO_ASK", 1.0)
    server = Server([])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        thread = threading.Thread(target=run, args=(server, listener))
        thread.start()
        try:
            with socket.create_connection(address, 20) as silent, socket.create_connection(address, 20) as asks:
                silent.sendall(b"GET /health HTTP/1.1\r\n")
                begun = time.monotonic()
                while time.monotonic() < begun + 1.5:
                    asks.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
                    told = b""
                    while b'"ok"' not in told:
                        more = asks.recv(4096)
                        assert more
                        told += more
                    time.sleep(0.1)
                assert silent.recv(1) == b""
        finally:
            server.is_ending = True
            thread.join()


def test_options_of_models(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_API_KEY", "secret")
    (tmp_path / "keys").write_text("one\ntwo\n")
    args = parse(
        [
            str(folder / "base"),
            "--host",
            "0.0.0.0",
            "--api_key_file",
            str(tmp_path / "keys"),
            "--system_prompt",
            "Be brief.",
        ]
    )
    server = make_server(args)
    assert server.rules.api_keys == ["secret", "one", "two"]
    assert server.rules.hosts == ()
    (model,) = server.models
    assert (model.name, model.processor.system_prompt) == ("base", "Be brief.")
    with pytest.raises(ValueError, match="Two models are called base; give one another name: NAME="):
        make_server(parse([str(folder / "base"), str(folder / "base")]))
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="holds no key"):
        parse(["model", "--api_key_file", str(tmp_path / "empty")])
