import asyncio
import base64
import contextlib
import io
import json
import logging
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.responses import JSONResponse

from asking import REPRESENTATIONS, as_data, chats, ecg, ecg_part, make, predicted, turn
from elm_ecg.training.evaluation.answers import NotFiniteError
from elm_ecg.training.serving.app import Server, make_app
from elm_ecg.training.serving.chats import Limits, ServedModel
from elm_ecg.training.serving.engine import Engine, EngineDownError, Piece
from elm_ecg.training.serving.guard import Guard, Rules
from elm_ecg.training.serving.metrics import Metrics
from elm_ecg.training.serving.transformers_engine import TransformersEngine
from helpers import save_record

PATH = "/v1/chat/completions"


def served(
    representation: str = "signal", engine: Engine | None = None, name: str = "tiny", **limits: int
) -> ServedModel:
    model, processor = make(representation)
    engine = engine or TransformersEngine(model, processor.tokenizer)
    stop = frozenset(processor.stop_token_ids)
    return ServedModel(name, processor, engine, stop, limits=Limits(**{"max_new_tokens": 8} | limits))


@pytest.fixture(scope="module")
def server() -> Server:
    return Server([served(max_ecgs=2, max_samples=100_000)])


@pytest.fixture(scope="module")
def client(server):
    with TestClient(make_app(server)) as client:
        yield client


def body(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages) or [turn(ecg_part(1), "Why?")], **fields}


def answer_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "/" not in error["message"].replace("application/json", "").replace("data:image/", "")  # no path
    return error


class Fake(Engine):
    """An engine that says what it is told to: pieces, or an error."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.is_healthy, self.is_closed = list(answers), True, False

    async def start(self) -> None:
        pass

    async def healthy(self) -> bool:
        return self.is_healthy

    async def close(self) -> None:
        pass

    async def generate(self, prompt: Any, options: Any):
        try:
            for answer in self.answers:
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, threading.Event):
                    while not answer.is_set():
                        await asyncio.sleep(0.01)
                else:
                    yield answer
        finally:
            self.is_closed = True


# what is answered


def test_answers_are_those_of_elm_predict_however_they_are_asked(client, tmp_path):
    asked = chats()
    expected = predicted(*make(), asked, 8)
    for chat, answer in zip(asked, expected, strict=True):
        response = client.post(PATH, json=body(*chat, max_tokens=8))
        assert answer_of(response) == answer
        streamed = client.post(PATH, json=body(*chat, stream=True, stream_options={"include_usage": True}))
        events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        *chunks, last = map(json.loads, events)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta.get("content", "") for delta in deltas) == answer
        assert chunks[-1]["choices"][0]["finish_reason"] == response.json()["choices"][0]["finish_reason"]
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == response.json()["usage"]["completion_tokens"]
    path = save_record(tmp_path / "a.npz", seed=3)
    array = np.load(path)["array"]
    samples = {"samples": array.tolist(), "sampling_rate": 500, "unit": "mV"}
    by_file, by_samples, other = (
        answer_of(client.post(PATH, json=body(turn(part, "Why?"))))
        for part in (as_data(path), {"type": "ecg", "ecg": samples}, ecg_part(5))
    )
    assert by_file == by_samples != other


@pytest.mark.slow
def test_fifty_at_once_of_all_representations():
    """Four models, chats of 0, 1 and 2 ECGs, streamed and not: each gets what `elm predict` writes alone."""
    models = [served(representation, name=representation) for representation in REPRESENTATIONS]
    asked, expected = [], []
    for representation in REPRESENTATIONS:
        of_model = chats(2.0 if representation == "signal" else 5.0)
        asked += [(representation, chat) for chat in of_model]
        expected += predicted(*make(representation), of_model, 8)
    requests = [(body(*chat, model=name), answer) for (name, chat), answer in zip(asked, expected, strict=True)] * 3
    random.Random(0).shuffle(requests)
    with TestClient(make_app(Server(models))) as client, ThreadPoolExecutor(50) as clients:

        def ask(request: tuple[dict[str, Any], str]) -> bool:
            return answer_of(client.post(PATH, json=request[0])) == request[1]

        assert all(clients.map(ask, requests[:50]))


def test_choices_and_logprobs(client):
    response = client.post(
        PATH, json=body(n=2, temperature=1.0, seed=1, logprobs=True, top_logprobs=3, max_completion_tokens=4)
    )
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["message"]["content"] != choices[1]["message"]["content"]
    for choice in choices:
        content = choice["logprobs"]["content"]
        assert 1 <= len(content) <= 4
        assert all(len(place["top_logprobs"]) == 3 and place["logprob"] < 0 for place in content)
    assert response.json()["usage"]["completion_tokens"] <= 8


def test_notices_are_told(client):
    leads = {"samples": ecg(1)["samples"][:2] + ecg(1)["samples"][6:], "sampling_rate": 250}
    leads["lead_names"] = ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]
    response = client.post(PATH, json=body(turn({"type": "ecg", "ecg": leads}, "Why?")))
    assert any("Derived from I and II" in notice for notice in response.json()["notices"])


def test_a_part_of_a_longer_record(client):
    long = ecg(1, seconds=5.0)
    error = error_of(client.post(PATH, json=body(turn({"type": "ecg", "ecg": long}, "Why?"))), 400)
    assert "5" in error["message"]
    part = {**long, "samples": [row[250:750] for row in long["samples"]]}
    by_start, by_part = (
        answer_of(client.post(PATH, json=body(turn({"type": "ecg", "ecg": one}, "Why?"))))
        for one in (long | {"start": 1.0}, part)
    )
    assert by_start == by_part


def test_a_picture(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    content = io.BytesIO()
    image.save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    with TestClient(make_app(Server([served("rgb")]))) as client:
        part = {"type": "image_url", "image_url": {"url": url}}
        assert answer_of(client.post(PATH, json=body(turn(part, "Why?"))))
        for wrong in ("http://localhost/a.png", "file:///etc/passwd", url[:-40], "data:image/svg+xml;base64,PHN2Zy8+"):
            part["image_url"]["url"] = wrong
            response = client.post(PATH, json=body(turn(part, "Why?")))
            assert response.status_code == 400
            assert "picture" in response.text or "image_url" in response.text


# what is refused


def ecg_of(content: bytes, **fields: Any) -> dict[str, Any]:
    return body(turn({"type": "ecg", "ecg": {"data": base64.b64encode(content).decode(), **fields}}, "Why?"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of: is no field that this server knows"),
        ({"max_tokens": 9}, "max_tokens is 9; this server writes at most 8"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [turn("a", role="tool")]}, "role"),
        ({"messages": [turn("a \ud800 b")]}, "half of a letter"),
        (body(turn({"type": "ecg", "ecg": ecg(1) | {"lead_names": ["\ud800"] + ["I"] * 11}})), "half of a letter"),
        ({"messages": [turn("What is <signal>?")]}, "holds <signal>"),
        ({"messages": [turn("a" * 9000)]}, "tokens and the model reads 8192"),
        ({"messages": [turn("a" * 300_000)]}, "letters and the model reads 8192"),
        ({"messages": [turn(*[ecg_part(1)] * 3)]}, "has 3 ECGs; this server takes at most 2"),
        (body(turn({"type": "ecg", "ecg": {}})), "either data"),
        (body(turn({"type": "ecg", "ecg": ecg(1) | {"sampling_rate": None}})), "no sampling rate"),
        (body(turn({"type": "ecg", "ecg": ecg(1) | {"sampling_rate": 1e-308}})), "expected 1 to 1e+06 hertz"),
        (
            body(turn({"type": "ecg", "ecg": ecg(1) | {"samples": [[1.0], [2.0, 3.0]]}})),
            "samples has leads of 1 to 2 samples",
        ),
        (body(turn({"type": "ecg", "ecg": ecg(1) | {"samples": [[1.0]] * 257}})), "at most 256"),
        (body(turn({"type": "ecg", "ecg": ecg(1, 200.0)})), "at most 100000"),
        (body(turn({"type": "image_url", "image_url": {"url": "http://a/b.png"}})), "reads samples, not pictures"),
        (ecg_of(b"no ECG"), r"ecg.dat is of no known format"),
        (ecg_of(b"\x89HDF\r\n\x1a\n" + b"a" * 99, format="h5"), "Cannot read ecg.h5 as HDF5"),
        (ecg_of(b"a 1 500 5000\n../../../etc/passwd 16 200 16 0 0 0 0 I\n", format="hea"), "a header of WFDB"),
        (ecg_of(b"x", format="../../a"), "format"),
        (ecg_of(b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'passwd'>]><a>&b;</a>"), "Cannot read ecg"),
    ],
)
def test_requests_at_fault(client, fields, expected):
    content = json.dumps({**body(), **fields})
    error = error_of(client.post(PATH, content=content, headers={"content-type": "application/json"}), 400)
    assert expected in error["message"]
    assert "root:" not in error["message"]


def test_what_changes_nothing_is_accepted(client):
    plain = answer_of(client.post(PATH, json=body()))
    more = {
        "user": "a",
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "presence_penalty": 0,
        "n": 1,
        "logit_bias": None,
    }
    more |= {"response_format": {"type": "text"}, "stop": None, "seed": -5, "top_p": 1, "max_tokens": None}
    assert answer_of(client.post(PATH, json=body(**more))) == plain
    earlier = {"role": "assistant", "content": "no", "refusal": None, "tool_calls": None, "annotations": []}
    client.post(PATH, json=body(turn("a"), earlier, turn("b"))).raise_for_status()
    client.post(PATH, json=body(turn("Be brief.", role="developer"), turn("a <|eot_id|> b"))).raise_for_status()


def test_other_paths_and_bodies(client):
    assert error_of(client.get("/v1/nothing"), 404)
    assert error_of(client.get(PATH), 405)
    assert error_of(client.post(PATH, json=body(model="other")), 404)["code"] == "model_not_found"
    for content in (b"{", b"\xff", b"[" * 100_000, b"null", b'{"model": ' + b"1" * 5000 + b"}"):
        error_of(client.post(PATH, content=content, headers={"content-type": "application/json"}), 400)
    assert "content-type: application/json" in error_of(client.post(PATH, content=b"{}"), 400)["message"]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"


# who may ask how much


def test_keys_hosts_and_rates(caplog):
    rules = Rules(api_keys=("one", "two"), hosts=("testserver",), requests_per_minute=2, max_body_bytes=5000)
    secret = "a patient of 1950"
    with (
        TestClient(make_app(Server([served()], rules, cors_origins=["https://page.org"]))) as client,
        caplog.at_level(logging.INFO),
    ):
        asked = body(turn(secret))
        assert error_of(client.post(PATH, json=asked), 401)["code"] == "invalid_api_key"
        wrong = client.post(PATH, json=asked, headers={"authorization": "Bearer three", "origin": "https://page.org"})
        assert wrong.headers["access-control-allow-origin"] == "https://page.org"
        assert wrong.headers["x-request-id"] in caplog.text
        assert client.get("/health").status_code == 200
        key = {"authorization": "Bearer two"}
        assert error_of(client.post(PATH, json=body(turn("a" * 5000)), headers=key), 413)

        def chunks():
            yield from [b"[" + b" " * 2000] * 5

        assert error_of(client.post(PATH, content=chunks(), headers=key), 413)
        busy = client.post(PATH, json=asked, headers=key)
        assert error_of(busy, 429)["code"] == "rate_limit_exceeded"
        assert 0 < int(busy.headers["retry-after"]) <= 60
        answer_of(client.post(PATH, json=asked, headers={"authorization": "Bearer one"}))
        assert error_of(client.get("/v1/models", headers={"host": "evil.org"}), 403)
        assert (
            "access-control-allow-origin" not in client.get("/health", headers={"origin": "https://evil.org"}).headers
        )
    assert secret not in caplog.text


def test_bodies_together_and_those_that_are_not_read(monkeypatch):
    """All bodies that are held have a limit; a client whose request was not read to its end cannot go on with it."""
    guard = Guard(None, Rules(max_body_bytes=100), Metrics(), ())
    sent: list[Any] = []

    async def ask(length: int, body: dict[str, Any]) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", **body}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            if length == 99:  # one that is being answered
                await ask(100, {"body": b"a" * 100})
            await JSONResponse({})(scope, receive, send)

        guard.app = app
        headers = [(b"content-length", str(length).encode())]
        await guard({"type": "http", "path": "/", "method": "POST", "headers": headers}, receive, send)

    monkeypatch.setattr("elm_ecg.training.serving.guard.BODIES", 1)
    asyncio.run(ask(99, {"body": b"a" * 99}))
    asyncio.run(ask(100, {"body": b"a" * 50, "more_body": True}))
    asyncio.run(ask(101, {}))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    closes = [(b"connection", b"close") in message["headers"] for message in starts]
    assert [message["status"] for message in starts] == [429, 200, 200, 413]
    assert closes == [False, False, True, True]
    assert guard.num_bytes == 0


def test_who_does_not_read_the_answer(caplog):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await JSONResponse({})(scope, receive, send)

    async def send(message: Any) -> None:
        await asyncio.sleep(10)

    guard = Guard(app, Rules(max_seconds=0.05), Metrics(), ())
    asyncio.run(guard({"type": "http", "path": "/", "method": "GET", "headers": []}, None, send))
    assert "does not read its answer" in caplog.text


def test_what_is_kept_is_of_one_client_alone():
    """A question that is asked again goes on from what was read, and tells nobody else that it was asked before."""
    with TestClient(make_app(Server([served()], Rules(api_keys=("one", "two"))))) as client:

        def cached(key: str) -> int:
            response = client.post(PATH, json=body(), headers={"authorization": f"Bearer {key}"})
            return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached(key) > 0 for key in ("one", "one", "two", "two")] == [False, True, False, True]


@pytest.mark.parametrize("origins", [[], ["https://page.org"]])
def test_pages_in_browsers(origins):
    """What a browser asks before it sends a question of a page: nobody may but those that are named."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with TestClient(
        make_app(Server([served(engine=Fake())], Rules(api_keys=("one",)), cors_origins=origins))
    ) as client:
        for origin in ("https://page.org", "https://evil.org", "null"):
            response = client.options(PATH, headers={"origin": origin, **asked})
            assert (response.headers.get("access-control-allow-origin") == origin) == (origin in origins)
            assert response.is_success == (origin in origins)


def test_texts_are_logged_if_asked_for(caplog):
    with TestClient(make_app(Server([served()], log_requests=True))) as client, caplog.at_level(logging.INFO):
        client.post(PATH, json=body(turn(ecg_part(1), "Is it fast?")))
    assert "Is it fast?" in caplog.text
    assert "samples" not in caplog.text


# faults


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (EngineDownError("down"), 503, "engine_down"),
        (NotFiniteError("nan"), 500, None),
        (ValueError("a batch at /etc/path"), 500, None),
        (KeyError("own fault at /etc/path"), 500, None),
    ],
)
def test_faults_of_the_engine(fault, status, code):
    with TestClient(make_app(Server([served(engine=Fake(fault))]))) as client:
        response = client.post(PATH, json=body())
        assert error_of(response, status)["code"] == code
        assert ("retry-after" in response.headers) == (status == 503)
    with TestClient(make_app(Server([served(engine=Fake(Piece(0, "Sin"), fault))]))) as client:
        *_, last = client.post(PATH, json=body(stream=True)).text.strip().split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == code
        assert "/etc" not in error["message"]


def test_health_and_the_end():
    engine = Fake(Piece(0, "a", num_tokens=1, finish_reason="stop"))
    server = Server([served(engine=engine)])
    with TestClient(make_app(server)) as client:
        assert answer_of(client.post(PATH, json=body())) == "a"
        engine.is_healthy = False
        assert client.get("/health").json() == {"status": "down"}
        engine.is_healthy, server.is_ending = True, True
        assert client.get("/health").status_code == 503
        assert error_of(client.post(PATH, json=body()), 503)["message"].startswith("The server is ending")
        metrics = client.get("/metrics").text
    assert 'elm_requests_total{path="/v1/chat/completions",status="200"} 1.0' in metrics
    assert 'elm_completion_tokens_total{model="tiny"} 1.0' in metrics
    assert "elm_requests_waiting 0.0" in metrics


def test_a_full_queue_and_a_slow_answer():
    event = threading.Event()
    engine = Fake(event, Piece(0, "a", finish_reason="stop"))
    server = Server([served(engine=engine)], max_queue=1, max_seconds=3.0)
    with TestClient(make_app(server)) as client:
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(client.post(PATH, json=body())))
        thread.start()
        while not server.waiting:
            event.wait(0.01)
        busy = client.post(PATH, json=body())
        assert error_of(busy, 429)["code"] == "queue_full"
        assert int(busy.headers["retry-after"]) > 0
        event.set()
        thread.join()
        assert answer_of(answers[0]) == "a"
        server.max_seconds = 0.2
        event.clear()
        assert "--max_seconds" in error_of(client.post(PATH, json=body()), 408)["message"]
        assert server.waiting == 0
        assert engine.is_closed


# the document that says what there is


@pytest.fixture(scope="module")
def address():
    """Of a server that listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = uvicorn.Server(uvicorn.Config(make_app(Server([served(max_ecgs=2)])), log_config=None))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        thread.join()


@pytest.mark.slow
def test_the_openapi_document_is_true(address):
    """Requests that follow it and that do not, at random; HYPOTHESIS_EXAMPLES=1000 tries more."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    number, tried = max(3, settings().max_examples // 8), 0
    for found in schema.get_all_operations():
        for mode in GenerationMode:

            @settings(max_examples=number, suppress_health_check=list(HealthCheck))
            @given(case=found.ok().as_strategy(generation_mode=mode))
            def fuzz(case: schemathesis.Case) -> None:
                nonlocal tried
                tried += 1
                case.call_and_validate(checks=checks)

            with contextlib.suppress(Unsatisfiable):  # a path without arguments has no wrong ones
                fuzz()
    assert tried > 10
