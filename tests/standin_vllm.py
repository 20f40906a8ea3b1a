"""A small server that speaks what vLLM's API of completions is asked here: prompts as embeddings, streamed tokens, what vLLM refuses.

with StandinVLLM(folder) as server:
    requests.post(server.url + "/v1/completions", ...)

`python tests/standin_vllm.py FOLDER [--port PORT] [--api_key KEY]` serves until it is ended. The language model is one that `elm
export` has written; transformers runs it, in batches of what waits. Of vLLM 0.32 are the fields, the statuses and the order of events.
"""

import argparse
import base64
import io
import json
import queue
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

MAX_LOGPROBS = 20
MAX_BATCH = 64


@dataclass
class _Row:
    """One answer that is written.

    Args:
        prompt: [tokens, width].
        request: the body.
        events: what comes to it: of each token its id, its log-probability, and those of the likeliest; at its end None.
    """

    prompt: torch.Tensor
    request: dict[str, Any]
    index: int
    events: queue.Queue
    gone: Event
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        seed = self.request.get("seed")
        self.generator = torch.Generator()
        self.generator.manual_seed(seed + self.index) if seed is not None else self.generator.seed()

    def take(self, logits: torch.Tensor, stop: set[int]) -> int:
        """The next token, of logits [vocabulary]."""
        if self.finish_reason is not None:
            return 0  # others of the batch go on
        logprobs = logits.log_softmax(-1)
        for token_id, bias in (self.request.get("logit_bias") or {}).items():
            logits[int(token_id)] += bias
        token = self._draw(logits)
        self.ids.append(token)
        if token in stop:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.request["max_tokens"]:
            self.finish_reason = "length"
        top = logprobs.topk(self.request.get("logprobs") or 0)
        likeliest = {token: logprobs[token].item()} | dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self.events.put((self.index, token, likeliest, self.finish_reason))
        return token

    def _draw(self, logits: torch.Tensor) -> int:
        temperature = self.request.get("temperature", 1.0)
        if temperature == 0:
            return int(logits.argmax())
        values, order = (logits / temperature).softmax(-1).sort(descending=True)
        values[values.cumsum(-1) - values >= self.request.get("top_p", 1.0)] = 0  # the likeliest always stays
        return int(order[torch.multinomial(values, 1, generator=self.generator)])


class Refused(Exception):
    """What the server answers in place of a completion."""

    def __init__(self, status: int, message: str, parameter: str | None = None):
        super().__init__(message)
        self.status, self.parameter = status, parameter


class StandinVLLM(ThreadingHTTPServer):
    """Serves an exported language model.

    Args:
        folder: of it.
        max_model_len: tokens of a prompt and its answer together.

    Attributes:
        down: everything is answered with 503.
        breaks_after: events after which a stream breaks off, without its end; None: never.
        seconds_a_token: how long it sleeps for each step of a batch.
        requests: bodies of all that were accepted, without their embeddings.
        aborted: how many answers nobody waited for any more.
        max_batch: the most answers that were written at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, folder: Path, name: str = "elm", port: int = 0, api_key: str | None = None, max_model_len: int = 1024
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.name, self.api_key, self.max_model_len = name, api_key, max_model_len
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        eos = self.model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.down, self.breaks_after, self.seconds_a_token = False, None, 0.0
        self.requests: list[dict[str, Any]] = []
        self.aborted, self.max_batch = 0, 0
        self.waiting: queue.Queue = queue.Queue()

    def __enter__(self) -> "StandinVLLM":
        Thread(target=self._write, daemon=True).start()
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.waiting.put(None)
        self.shutdown()
        self.server_close()

    def _write(self) -> None:
        """Writes batches of what waits, until None comes."""
        while (row := self.waiting.get()) is not None:
            rows = [row]
            while len(rows) < MAX_BATCH and not self.waiting.empty() and self.waiting.queue[0] is not None:
                rows.append(self.waiting.get())
            self.max_batch = max(self.max_batch, len(rows))
            self._write_batch(rows)

    @torch.inference_mode()
    def _write_batch(self, rows: list[_Row]) -> None:
        length = max(len(row.prompt) for row in rows)
        padded = [torch.nn.functional.pad(row.prompt, (0, 0, length - len(row.prompt), 0)) for row in rows]
        inputs: dict[str, Any] = {"inputs_embeds": torch.stack(padded).to(self.model.dtype)}
        mask = torch.tensor([[0] * (length - len(row.prompt)) + [1] * len(row.prompt) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        while any(row.finish_reason is None for row in rows):
            time.sleep(self.seconds_a_token)
            output = self.model(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            for row in rows:
                if row.gone.is_set() and row.finish_reason is None:
                    row.finish_reason = "abort"
                    self.aborted += 1
            stops = [self.eos | set(row.request.get("stop_token_ids") or []) for row in rows]
            logits = output.logits[:, -1].float()
            tokens = [row.take(*pair) for row, *pair in zip(rows, logits, stops, strict=True)]
            inputs = {"input_ids": torch.tensor(tokens).unsqueeze(-1)}
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1

    def rows_of(self, request: dict[str, Any]) -> list[_Row]:
        """The answers that a request asks for.

        Raises:
            Refused: it is at fault.
        """
        if request.get("model") not in (None, self.name):
            raise Refused(404, f"The model `{request['model']}` does not exist.", "model")
        if request.get("prompt"):
            raise Refused(400, "This stand-in takes prompt_embeds alone.", "prompt")
        if not request.get("prompt_embeds"):
            raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        if not request.get("stream"):
            raise Refused(400, "This stand-in streams its answers.", "stream")
        prompt = self._prompt(request["prompt_embeds"])
        request.setdefault("max_tokens", 16)
        if len(prompt) + request["max_tokens"] > self.max_model_len:
            raise Refused(400, f"This model's maximum context length is {self.max_model_len} tokens.", "max_tokens")
        if request.get("temperature", 1.0) < 0:
            raise Refused(400, "temperature must be non-negative.", "temperature")
        if not 0 < request.get("top_p", 1.0) <= 1:
            raise Refused(400, "top_p must be in (0, 1].", "top_p")
        if not 0 <= (request.get("logprobs") or 0) <= MAX_LOGPROBS:
            raise Refused(400, f"Requested more than the {MAX_LOGPROBS} logprobs that are allowed.", "logprobs")
        vocabulary = self.model.config.vocab_size
        for token_id in request.get("logit_bias") or {}:
            if not 0 <= int(token_id) < vocabulary:
                raise Refused(400, f"token_id {token_id} in logit_bias contains out-of-vocab token id.", "logit_bias")
        self.requests.append({name: value for name, value in request.items() if name != "prompt_embeds"})
        events, gone = queue.Queue(), Event()
        return [_Row(prompt, request, index, events, gone) for index in range(request.get("n", 1))]

    def _prompt(self, embeds: str) -> torch.Tensor:
        """[tokens, width]"""
        try:
            tensor = torch.load(io.BytesIO(base64.b64decode(embeds, validate=True)), weights_only=True)
        except Exception as error:
            raise Refused(400, f"`prompt_embeds` could not be deserialized: {error}", "prompt_embeds") from error
        width = self.model.config.hidden_size
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.shape[1] != width:
            raise Refused(400, f"`prompt_embeds` must be a tensor of shape (num_tokens, {width}).", "prompt_embeds")
        if not tensor.is_floating_point():
            raise Refused(400, f"`prompt_embeds` dtype {tensor.dtype} is not a floating-point type.", "prompt_embeds")
        return tensor


class _Handler(BaseHTTPRequestHandler):
    server: StandinVLLM
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.server.down:
            self._send(503, {})
        elif self.path == "/health":
            self._send(200, {})
        elif self._may_enter():
            model = {"id": self.server.name, "object": "model", "max_model_len": self.server.max_model_len}
            self._send(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.down:
            self._send(503, {})
        elif self._may_enter():
            try:
                request = json.loads(body)
                rows = self.server.rows_of(request)
            except Refused as refused:
                error = {"message": str(refused), "type": "BadRequestError", "param": refused.parameter}
                self._send(refused.status, {"error": error | {"code": refused.status}})
                return
            for row in rows:
                self.server.waiting.put(row)
            self._stream(rows)

    def _may_enter(self) -> bool:
        key = self.server.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._send(401, {"error": "Unauthorized"})
        return False

    def _choices(self, rows: list[_Row]) -> Any:
        """What comes to the answers, until all have ended."""
        texts, open_rows = [""] * len(rows), len(rows)
        tokenizer = self.server.tokenizer
        while open_rows:
            index, token, likeliest, reason = rows[0].events.get()
            row = rows[index]
            ids = row.ids[: len(row.ids) - (reason == "stop")]
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            choice = {"index": index, "text": whole[len(texts[index]) :], "finish_reason": reason, "token_ids": [token]}
            texts[index] = whole
            if row.request.get("logprobs") is not None:
                named = {self._name(row, one): value for one, value in likeliest.items()}
                choice["logprobs"] = {
                    "tokens": [self._name(row, token)],
                    "token_logprobs": [likeliest[token]],
                    "top_logprobs": [named],
                    "text_offset": [len(texts[index])],
                }
            if not row.request.get("return_token_ids"):
                del choice["token_ids"]
            open_rows -= reason is not None
            yield choice

    def _name(self, row: _Row, token: int) -> str:
        as_ids = row.request.get("return_tokens_as_token_ids")
        return f"token_id:{token}" if as_ids else self.server.tokenizer.decode([token])

    def _stream(self, rows: list[_Row]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for number, choice in enumerate(self._choices(rows)):
                if number == self.server.breaks_after:
                    return
                self.wfile.write(
                    f"data: {json.dumps({'id': 'cmpl-0', 'choices': [choice]}, ensure_ascii=False)}\n\n".encode()
                )
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            rows[0].gone.set()
            self.close_connection = True

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api_key")
    args = parser.parse_args()
    with StandinVLLM(args.folder, port=args.port, api_key=args.api_key) as server:
        print(server.url, flush=True)
        while True:
            time.sleep(3600)
