"""The chat of a request to the prompt of a model, with the readers and the processor of all commands. No file of this machine is read."""

import base64
import binascii
import io
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elm_ecg.ecg_formats import SAMPLING_RATES
from elm_ecg.ecg_formats_wfdb import is_wfdb_header
from elm_ecg.ecg_utils import ECGRecord, as_record, read_ecg
from elm_ecg.modeling_elm import ECG_INPUTS
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.data.loading import notices_of
from elm_ecg.training.serving.engine import Engine, Prompt, SamplingOptions
from elm_ecg.training.serving.protocol import ECG, ChatRequest, ECGPart, ImagePart, TextPart

MAX_PIXELS = 50_000_000  # of a picture: a page that was scanned at 600 dots an inch
MAX_KNOWN = 1000
# more are not even made tokens, which takes minutes and gigabytes where somebody sends as much as a request may hold
MAX_LETTERS = 32  # of a chat for each token that its model reads
MAX_CONTEXT = 2**20  # of a model that reads any number of tokens
PICTURES = ("PNG", "JPEG", "WEBP")
# readers see some damage by Python's warnings, whose filters all threads share: one file is read at a time
_reading_file = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """Of a request.

    Args:
        max_new_tokens: the longest answer, and that of a request which does not say.
        max_ecgs: ECGs and pictures of a chat.
        max_samples: of an ECG, of all leads together.
    """

    max_new_tokens: int = 512
    max_ecgs: int = 8
    max_samples: int = 4_000_000


@dataclass(frozen=True)
class Prepared:
    """What an engine is asked, and sentences about the ECGs."""

    prompt: Prompt
    options: SamplingOptions
    notices: list[str]


@dataclass
class ServedModel:
    """A model by its name.

    Args:
        processor: its own; of no other thread while it works.
        adapter: of the engine's model.
        stop_token_ids: each ends an answer.
    """

    name: str
    processor: ELMProcessor
    engine: Engine
    stop_token_ids: frozenset[int]
    adapter: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # the tokenizers library lets one thread at a time change how it pads
        self._known: dict[Any, list[str]] = {}
        self._opening, self._given = self.processor.answer_opening, self.processor.given_answer
        tokens = self.processor.tokenizer.added_tokens_decoder.values()
        self._control = [token.content for token in tokens if not token.content.isspace()]

    def prepare(self, request: ChatRequest, client: str = "") -> Prepared:
        """What the engine is asked. It reads and computes: not for an event loop.

        Args:
            client: who asks, as `Prompt` has it.

        Raises:
            ValueError, ImportError: the request is at fault; says why in words for the client.
        """
        chat, notices = self._chat(request)
        with self._lock:
            inputs: Any = self.processor.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                # what a user writes is text, and ends no turn
                sanitize_control_tokens=self._has_control(chat),
            )
        input_ids = inputs["input_ids"][0].tolist()
        prompt = Prompt(
            input_ids=input_ids,
            ecg_inputs={name: inputs[name] for name in ECG_INPUTS if name in inputs},
            adapter=self.adapter,
            client=client,
            stop_token_ids=self.stop_token_ids,
            opening=self._opening,
            given=self._given,
        )
        return Prepared(prompt, self._options(request, len(input_ids)), notices)

    def _options(self, request: ChatRequest, num_tokens: int) -> SamplingOptions:
        limit, context = self.limits.max_new_tokens, self.engine.context
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        asked = getattr(request, name) or limit
        if asked > limit:
            raise ValueError(f"{name} is {asked}; this server writes at most {limit} tokens: ask for fewer.")
        room = asked if context is None else min(asked, context - num_tokens)
        if room < 1:
            raise ValueError(
                f"The chat has {num_tokens} tokens and the model reads {context}: shorten it, or begin a new one."
            )
        return SamplingOptions(
            max_new_tokens=room,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            n=request.n or 1,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            stream=bool(request.stream),
        )

    def _chat(self, request: ChatRequest) -> tuple[list[dict[str, Any]], list[str]]:
        """The chat as the processor takes it, and what is to be known of its ECGs."""
        self._check_size(request)
        parts = [
            part for message in request.messages for part in message.content if isinstance(part, ECGPart | ImagePart)
        ]
        if len(parts) > self.limits.max_ecgs:
            raise ValueError(f"The chat has {len(parts)} ECGs; this server takes at most {self.limits.max_ecgs}.")
        if parts and not self.processor.takes_ecgs:
            raise ValueError(f"The model {self.name} is text-only: it takes no ECG.")
        chat: list[dict[str, Any]] = []
        notices: dict[str, None] = {}  # in their order, each once
        for message in request.messages:
            content: list[dict[str, Any]] = []
            given = (
                [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            )
            for part in given:
                if isinstance(part, TextPart):
                    if self.processor.ecg_token in part.text:
                        raise ValueError(
                            f"A text holds {self.processor.ecg_token}, by which this model knows the place of an ECG: write another word."
                        )
                    content.append({"type": "text", "text": part.text})
                    continue
                ecg: Any = self._record(part.ecg) if isinstance(part, ECGPart) else self._picture(part.image_url.url)
                if isinstance(ecg, ECGRecord):
                    notices.update(dict.fromkeys(self._notices(ecg)))
                content.append({"type": "ecg", "ecg": ecg})
            chat.append({"role": "system" if message.role == "developer" else message.role, "content": content})
        return chat, list(notices)

    def _check_size(self, request: ChatRequest) -> None:
        size, most = 0, self.engine.context or MAX_CONTEXT
        for message in request.messages:
            size += 1 + len(message.content)  # letters, or parts
            size += sum(len(part.text) for part in message.content if isinstance(part, TextPart))
        if size > MAX_LETTERS * most:
            raise ValueError(f"The chat has {size} letters and the model reads {most} tokens: shorten it.")

    def _record(self, ecg: ECG) -> ECGRecord:
        lowest, highest = SAMPLING_RATES
        if ecg.sampling_rate is not None and not lowest <= ecg.sampling_rate <= highest:
            raise ValueError(f"sampling_rate is {ecg.sampling_rate:g}; expected {lowest:g} to {highest:g} hertz.")
        described: dict[str, Any] = {"sampling_rate": ecg.sampling_rate, "unit": ecg.unit, "lead_names": ecg.lead_names}
        if ecg.data is not None:
            record = _read(_decoded(ecg.data), ecg.format, described)
        else:
            assert ecg.samples is not None
            record = as_record(_array(ecg.samples), **described)
        if record.array.size > self.limits.max_samples:
            raise ValueError(
                f"The ECG has {record.array.size} samples; this server takes at most {self.limits.max_samples}: cut it."
            )
        return record if ecg.start is None else replace(record, metadata={**record.metadata, "start": ecg.start})

    def _picture(self, url: str) -> Image.Image:
        if self.processor.representation != "rgb":
            raise ValueError(f"The model {self.name} reads samples, not pictures: send a part of type ecg.")
        head, comma, content = url.partition(",")
        if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
            raise ValueError("image_url is no data:image/...;base64 URL; nothing is fetched from other places.")
        try:
            image = Image.open(io.BytesIO(_decoded(content)), formats=PICTURES)  # of which only the head is read yet
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels; expected at most {MAX_PIXELS}")
            return image.convert("RGB")
        except Exception as error:  # damaged pictures raise all sorts of things
            raise ValueError(f"The picture cannot be read as {', '.join(PICTURES)}: {error}.") from error

    def _notices(self, record: ECGRecord) -> list[str]:
        if len(self._known) > MAX_KNOWN:  # lengths are the clients' choice
            self._known.clear()
        return notices_of(record, self.processor.feature_extractor, self._known)

    def _has_control(self, chat: list[dict[str, Any]]) -> bool:
        """Whether somebody other than the model writes one of its tokens that are no words; answers hold tags of thinking."""
        texts = [
            part["text"]
            for message in chat
            if message["role"] != "assistant"
            for part in message["content"]
            if part["type"] == "text"
        ]
        return any(token in text for text in texts for token in self._control)


def _decoded(data: str) -> bytes:
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"data is no base64: {error}.") from error


def _array(samples: Sequence[Sequence[float | None]]) -> np.ndarray:
    """float64 [leads, samples], NaN where one is missing."""
    lengths = {len(row) for row in samples}
    if len(lengths) > 1:
        raise ValueError(
            f"samples has leads of {min(lengths)} to {max(lengths)} samples; all leads have to be of one length."
        )
    return np.array(samples, dtype=np.float64)  # None becomes NaN


def _read(content: bytes, ending: str | None, described: dict[str, Any]) -> ECGRecord:
    """The record of a file's content, which lies alone in a folder as long as it is read."""
    if is_wfdb_header(content):
        raise ValueError(
            "data is a header of WFDB, which names files that are not here: send the samples with sampling_rate, unit and lead_names."
        )
    with _reading_file, tempfile.TemporaryDirectory(prefix="elm-serve-") as folder:
        path = Path(folder) / f"ecg.{ending or 'dat'}"
        path.write_bytes(content)
        try:
            return read_ecg(path, **described)
        except (ValueError, OSError, ImportError) as error:
            told = " ".join(str(error).split())
            for place in {folder, os.path.realpath(folder)}:
                told = told.replace(f"{place}{os.sep}", "").replace(place, "")
            kind = ImportError if isinstance(error, ImportError) else ValueError
            raise kind(told) from None
