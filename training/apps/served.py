"""A model behind an address, as `elm serve` gives it: what `elm chat --server` and `elm demo --server` ask."""

import base64
import io
import json
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from elm_ecg.ecg_utils import ECGRecord, read_ecg
from elm_ecg.training.apps.conversation import DEFAULT_MAX_NEW_TOKENS, ChatECG, facts_of

KEY = "ELM_API_KEY"  # of the environment
CONNECT_SECONDS = 10
SHOWN_SECONDS = 10.0  # of an ECG that is drawn: the server alone knows which part its model reads
LOCAL_OPTIONS = {
    "revision": "main",
    "trust_remote_code": False,
    "dtype": "auto",
}  # of a model that is loaded, and defaults


class ServedModel:
    """A model of a server that speaks OpenAI's protocol and takes ECGs as parts of a message.

    Args:
        url: of the server, with or without /v1.
        name: of the model; None: the server has one alone.
        api_key: that the server asks for; None: that of the environment, if there is one.

    Raises:
        ValueError: the server does not answer, lets nobody in with this key, or has no such model.
    """

    def __init__(self, url: str, name: str | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY) if api_key is None else api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # an answer takes as long as the server lets it
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS))
        with self._asking(), self._client.stream("GET", f"{self.url}/v1/models") as answer:
            names = [model["id"] for model in self._checked(answer)["data"]]
        if name is None and len(names) != 1:
            raise ValueError(f"--server {url} has {len(names)} models; name one: {', '.join(names)}.")
        if name is not None and name not in names:
            raise ValueError(f"--server {url} has no model {name}; it has {', '.join(names)}.")
        self.name = name or names[0]
        self.notices: list[str] = []  # sentences of the server about the ECGs of the last chat

    def answer(
        self,
        chat: list[dict[str, Any]],
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> Generator[str, None, None]:
        """As `stream_answer`: the answer to the last turn, piece by piece; closing the iterator ends it on the server too.

        Args:
            chat: of `as_message`. Of each ECG samples, rate and leads are sent, and nothing else that its file says.
            system_prompt: None: that of the model's training.

        Raises:
            ValueError: the server refuses, or breaks off; says why.
        """
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        body = {
            "model": self.name,
            "messages": [*system, *map(_as_sent, chat)],
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
        }
        with self._asking(), self._client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            self._checked(answer, whole=False)
            for line in answer.iter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise ValueError(f"The server ended the answer: {event['error']['message']}")
                    self.notices = event.get("notices", self.notices)
                    if piece := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
                        yield piece
        raise ValueError(f"The server at {self.url} went away before the end of its answer.")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Errors of the network as one ValueError."""
        try:
            yield
        except httpx2.ConnectError as error:
            raise ValueError(
                f"--server {self.url} does not answer ({error}); `elm serve MODEL` starts a server, which says its address."
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ValueError(f"--server {self.url} cannot be asked: {type(error).__name__}: {error}") from error

    def _checked(self, answer: httpx2.Response, whole: bool = True) -> Any:
        """The JSON of an answer; without `whole`, of an error alone.

        Raises:
            ValueError: it is an error, which is told, or no JSON.
        """
        if answer.is_success and not whole:
            return None
        try:
            content = json.loads(answer.read())
            told = None if answer.is_success else content["error"]["message"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--server {self.url} is no server of `elm serve`: it answers with status {answer.status_code}."
            ) from error
        if answer.status_code == 401:
            raise ValueError(f"--server {self.url}: {told} Give it with --api_key, or as {KEY} in the environment.")
        if told is not None:
            later = answer.headers.get("Retry-After")
            raise ValueError(f"The server: {told}" + (f" (Ask again in {later} s.)" if later else ""))
        return content


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its ECGs as the server takes them."""
    parts = [
        {"type": "ecg", "ecg": _encoded(part["ecg"])} if part["type"] == "ecg" else part for part in message["content"]
    ]
    return {**message, "content": parts}


def _encoded(record: ECGRecord) -> dict[str, Any]:
    """The samples as they are, in NumPy's format: whatever the file was, and without a name or date that it may hold."""
    buffer = io.BytesIO()
    described: dict[str, Any] = {"sampling_rate": record.sampling_rate, "lead_names": record.lead_names, "unit": "mV"}
    np.savez_compressed(buffer, array=record.array, **described)
    sent = {"data": base64.b64encode(buffer.getvalue()).decode("ascii"), "format": "npz"}
    return sent | ({"start": record.metadata["start"]} if "start" in record.metadata else {})


def read_to_send(path: Path, start: float | None = None, **described: Any) -> ChatECG:
    """As `read_for_model`, for a model that is elsewhere: which part it reads, the server knows.

    Raises:
        ValueError: the file is no ECG, or ends before `start`.
        OSError, ImportError: as `read_ecg`.
    """
    record = read_ecg(path, **described)
    rate, duration = record.sampling_rate, record.array.shape[1] / record.sampling_rate
    if start is not None:
        if not 0 <= start < duration:
            raise ValueError(f"{path}: start is {start:g}; the record lasts {duration:g} s.")
        record = replace(record, metadata={**record.metadata, "start": start})
    first = round((start or 0.0) * rate)
    shown = record.array[:, first : first + round(SHOWN_SECONDS * rate)]
    prepared = replace(record, array=shown, metadata={**record.metadata, "start_second": first / rate})
    return ChatECG(path.name, record, prepared, " ".join([*facts_of(record), *record.metadata.get("notices", ())]))


def check_options(args: Any) -> None:
    """ValueError for options of `model_parser` that do not go with or without `--server`."""
    if args.server is None:
        if args.model is None:
            raise ValueError("MODEL is missing; name a saved ELM, or a server with --server.")
        if args.api_key is not None:
            raise ValueError("--api_key is of a server; add --server, or leave it out.")
        return
    for name, default in LOCAL_OPTIONS.items():
        if getattr(args, name) != default:
            raise ValueError(
                f"--{name} is of a model that is loaded here; with --server it is loaded there: leave it out."
            )
