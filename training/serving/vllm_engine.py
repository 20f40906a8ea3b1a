"""Answers by a vLLM server: encoder, connector and embeddings work here, the language model there.

vLLM takes prompts as embeddings where it is started with `--enable-prompt-embeds`, on the language model that `elm export` writes. It
batches what comes continuously, so each request here is one there, and one that is closed here ends there.

What vLLM writes comes as ids of tokens, of which the text is made here, as everywhere in this project. Stop texts are looked for here
too: what vLLM would compare them with has the answer's opening in it.
"""

import asyncio
import base64
import contextlib
import copy
import io
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import torch

from elm_ecg.modeling_common import ECG_INPUTS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import NotFiniteError
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.serving.engine import (
    Engine,
    EngineDownError,
    Piece,
    Prompt,
    QueueFullError,
    SamplingOptions,
    TokenLogprob,
)
from elm_ecg.training.serving.pieces import AnswerText, Detokenizer

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5
HEALTH_SECONDS = 5
KEPT_BYTES = 256 * 2**20  # of the features of ECGs that were seen before
SMALLEST = 1e-6  # in place of a `top_p` of 0, which vLLM refuses: the likeliest token alone
SUPPRESSED = -100  # the lowest that vLLM takes for the logits of tokens that are never written


class VLLMEngine(Engine):
    """As `Engine`, of a vLLM server.

    Args:
        model: of its language model only the embeddings are kept in memory.
        tokenizer: of the language model.
        url: of the server, such as http://127.0.0.1:8000.
        model_name: that the server has for the language model; None: it serves one alone.
        api_key: that the server asks for.

    Raises:
        ValueError: the language model reads more than embeddings.
    """

    def __init__(
        self,
        model: ELMForConditionalGeneration,
        tokenizer: Any,
        url: str,
        model_name: str | None = None,
        api_key: str | None = None,
    ) -> None:
        check_reads_embeddings(model)
        drop_layers(model)
        self.model, self.tokenizer = model, copy.deepcopy(tokenizer)  # which the front's threads use
        self.url, self.model_name = url.rstrip("/").removesuffix("/v1"), model_name
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._features = None if model.model.encoder is None else EncoderFeatures(model.model, max_bytes=KEPT_BYTES)
        # one prompt after the other: each takes all cores
        self._thread = ThreadPoolExecutor(1, "embed")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # the server here limits how many wait, and how long
        timeout, limits = httpx2.Timeout(None, connect=CONNECT_SECONDS), httpx2.Limits(max_connections=None)
        self._client = httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self._known = False  # whether the server has told its name of the model, and its context

    async def start(self) -> None:
        """Asks the server what it serves; if it is not there yet, or serves something else, that is logged, and asked again later."""
        with contextlib.suppress(EngineDownError):
            await self._ask_models()

    async def generate(self, prompt: Prompt, options: SamplingOptions) -> AsyncGenerator[Piece, None]:
        """See [`Engine`]."""
        await self._ask_models()
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._thread, self._body, prompt, options)
        choices = [_Choice(self.tokenizer, prompt, options, index) for index in range(options.n)]
        headers = {"Content-Type": "application/json"}
        try:
            async with self._client.stream(
                "POST", f"{self.url}/v1/completions", content=body, headers=headers
            ) as answer:
                await self._check(answer)
                async for event in _events(answer):
                    for part in event.get("choices", ()):
                        if not (choice := choices[part["index"]]).ended:
                            yield choice.piece(part)
                    if all(choice.ended for choice in choices):
                        return
        except (httpx2.TransportError, httpx2.StreamError, ValueError, KeyError, TypeError) as error:
            raise self._down(f"{type(error).__name__}: {error}") from error
        raise self._down("the answer ended before its end")

    async def healthy(self) -> bool:
        """See [`Engine`]."""
        try:
            await self._ask_models()
            return (await self._client.get(f"{self.url}/health", timeout=HEALTH_SECONDS)).is_success
        except (httpx2.TransportError, EngineDownError):
            return False

    async def close(self) -> None:
        """See [`Engine`]."""
        await self._client.aclose()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _ask_models(self) -> None:
        """Learns once what the server calls the model, and how many tokens it reads.

        Raises:
            EngineDownError: it does not say, or does not serve the model.
        """
        if self._known:
            return
        try:
            answer = await self._client.get(f"{self.url}/v1/models", timeout=HEALTH_SECONDS)
            await self._check(answer)
            served = {model["id"]: model for model in answer.json()["data"]}
        except (httpx2.TransportError, ValueError, KeyError, TypeError) as error:
            raise self._down(f"{type(error).__name__}: {error}") from error
        name = self.model_name or (next(iter(served)) if len(served) == 1 else None)
        if name not in served:
            asked = "several models" if name is None else f"no model {name}"
            names = ", ".join(served)
            raise self._down(f"it serves {asked}; say with --engine_model which of {names} is the language model")
        self.model_name, self._known = name, True
        lengths = [self.context, served[name].get("max_model_len")]
        self.context = min((length for length in lengths if length is not None), default=None)

    async def _check(self, answer: httpx2.Response) -> None:
        """EngineDownError or QueueFullError if the server refuses; what it says is logged, as it may name its own files."""
        if answer.is_success:
            return
        told = (await answer.aread())[:500].decode(errors="replace")
        if answer.status_code == 429:
            retry_after = answer.headers.get("Retry-After", "1")
            raise QueueFullError("The engine has no place.", int(retry_after) if retry_after.isdecimal() else 1)
        raise self._down(f"status {answer.status_code}: {told}")

    def _down(self, reason: str) -> EngineDownError:
        logger.warning("The engine at %s does not answer: %s", self.url, reason)
        return EngineDownError("The engine does not answer.")

    def _body(self, prompt: Prompt, options: SamplingOptions) -> bytes:
        """A request of `/v1/completions`. What is not said vLLM would take from the model's `generation_config.json`."""
        config: Any = self.model.generation_config
        vocabulary = self.model.config.get_text_config().vocab_size
        suppressed = [token_id for token_id in config.suppress_tokens or [] if token_id < vocabulary]
        asked = {
            "model": self.model_name,
            "prompt_embeds": as_base64(prompt_embeddings(self.model, prompt, self._features)),
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": max(options.top_p, SMALLEST),
            "top_k": 0,  # all
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "n": options.n,
            "seed": options.seed,
            "stop_token_ids": sorted(prompt.stop_token_ids),
            "logit_bias": dict.fromkeys(suppressed, SUPPRESSED) or None,
            "logprobs": options.top_logprobs,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "stream": True,
            "cache_salt": prompt.client or None,  # what is kept of a prompt is of one client alone
        }
        return json.dumps({name: value for name, value in asked.items() if value is not None}).encode()


class _Choice:
    """One of the answers to a prompt, of what vLLM tells of its tokens."""

    def __init__(self, tokenizer: Any, prompt: Prompt, options: SamplingOptions, index: int) -> None:
        self.tokenizer, self.index, self.stop_token_ids = tokenizer, index, prompt.stop_token_ids
        self.num_top = options.top_logprobs
        self.tokens = Detokenizer(tokenizer)
        self.answer = AnswerText(prompt.opening, prompt.given, options.stop)
        self.ended = False

    def piece(self, part: dict[str, Any]) -> Piece:
        """What a part of vLLM's stream, `{"index", "token_ids", "logprobs", "finish_reason"}`, adds to the answer.

        Raises:
            EngineDownError: it gave up.
        """
        ids, reason = part["token_ids"], part["finish_reason"]
        if reason not in (None, "stop", "length"):  # `abort`, `error`
            logger.warning("The engine ended an answer: %s", reason)
            raise EngineDownError("The engine has ended the answer.")
        text = self.answer.push(self.tokens.push(ids))
        if reason is not None:
            text += self.answer.push(self.tokens.end())
            text += self.answer.end()
        if self.answer.stopped:
            reason = "stop"
        self.ended = reason is not None
        written = len(ids) - bool(ids and ids[-1] in self.stop_token_ids)
        logprobs = () if self.num_top is None else self._logprobs(part["logprobs"], written)
        return Piece(self.index, text, logprobs, len(ids), finish_reason=reason)

    def _logprobs(self, told: dict[str, Any], number: int) -> tuple[TokenLogprob, ...]:
        """Of the first so many tokens; vLLM lists the token that was taken among the likeliest, even where it is none of them."""
        tokens = []
        for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
            likeliest = sorted(top.items(), key=lambda pair: -pair[1])[: self.num_top]
            named = tuple((self._text(name), value) for name, value in likeliest)
            tokens.append(TokenLogprob(self._text(token), logprob, named))
        return tuple(tokens[:number])

    def _text(self, token: str) -> str:
        """The text of `token_id:17` by itself."""
        return self.tokenizer.decode([int(token.removeprefix("token_id:"))])


async def _events(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream up to `[DONE]` (EngineDownError: one tells of an error)."""
    async for line in _lines(answer):
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                logger.warning("The engine has failed: %s", str(event["error"])[:500])
                raise EngineDownError("The engine has failed.")
            yield event


async def _lines(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """Lines up to a line feed. `aiter_lines` would also end one at U+2028 and its like, which stand in answers as they are."""
    rest = b""
    async for part in answer.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


def check_reads_embeddings(model: ELMForConditionalGeneration) -> None:
    """ValueError if vLLM cannot answer from the embeddings of a prompt as the language model does."""
    config = model.config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"--engine vllm: the layers of this language model ({config.model_type}) read the ids of the text too, and vLLM would get "
            "embeddings alone; leave --engine out."
        )
    if config.model_type == "falcon_h1":
        raise ValueError(
            "--engine vllm: vLLM scales what it gets as embeddings for this language model (falcon_h1), which its own does not; leave "
            "--engine out."
        )


@torch.no_grad()
def drop_layers(model: ELMForConditionalGeneration) -> None:
    """Frees the memory of the language model and its head, but for the embeddings."""
    embeddings: Any = model.get_input_embeddings()
    for module in (*model.model.language_model.modules(), model.lm_head):
        if module is not embeddings:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter is not embeddings.weight:
                    module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)


@torch.inference_mode()
def prompt_embeddings(
    model: ELMForConditionalGeneration, prompt: Prompt, features: EncoderFeatures | None = None
) -> torch.Tensor:
    """What the language model reads of a prompt [tokens, width], as `ELMModel.forward` makes it.

    Args:
        features: of the model's encoder, which keeps those of ECGs that were seen before.

    Raises:
        NotFiniteError: some are NaN or infinite.
    """
    elm = model.model
    input_ids = torch.tensor([prompt.input_ids], device=model.device)
    embeddings = elm.embed(input_ids)
    if prompt.ecg_inputs:
        ecgs = dict(prompt.ecg_inputs) if features is None else features.replace(dict(prompt.ecg_inputs))
        ecgs = {name: values.to(model.device) for name, values in ecgs.items() if name in ECG_INPUTS}
        of_ecgs = elm.get_ecg_features(**ecgs).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(elm.get_placeholder_mask(input_ids, of_ecgs), of_ecgs)
    if not embeddings.isfinite().all():
        raise NotFiniteError("The encoder or the connector gives NaN or infinity for these ECGs.")
    return embeddings[0]


def as_base64(embeddings: torch.Tensor) -> str:
    """A tensor as vLLM reads it."""
    buffer = io.BytesIO()
    torch.save(embeddings.cpu().contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
