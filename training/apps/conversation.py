"""Reading ECGs for a loaded ELM, and its streamed answers: what `elm chat` and `elm demo` share.

It travels into Spaces too, so it imports no training library.
"""

import argparse
import contextlib
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer

from elm_ecg import ecg_utils
from elm_ecg.ecg_utils import LIMB_LEADS, ECGRecord, lead_quality, read_ecg

DISCLAIMER = (
    "Research software, not a medical device. Nothing that the model says may be used for the care of a patient."
)
DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class ShownECG:
    """An ECG of a conversation.

    Args:
        name: of its file.
        record: the part of it that the model takes.
        facts: what was read, in words.
    """

    name: str
    record: ECGRecord
    facts: str


def read_for_model(processor: Any, path: Path, start: float | None = None, **described: Any) -> ShownECG:
    """Reads an ECG file, and takes the part of it that the model sees.

    Args:
        start: second at which this part begins, of a record that is longer than the model takes. None: what the model's
            feature extractor keeps, and where it keeps nothing, the first seconds.
        described: the other arguments of `read_ecg`.

    Raises:
        ValueError: the model is text-only, the file is no ECG, or the model cannot take it.
        OSError, ImportError: as `read_ecg`.
    """
    if not processor.takes_ecgs:
        raise ValueError("This model is text-only: it takes no ECG.")
    with _collected_warnings() as warnings:
        record = read_ecg(path, **described)
    extractor = processor.feature_extractor
    rate, num_samples = record.sampling_rate, record.array.shape[1]
    duration, seconds = num_samples / rate, extractor.num_samples / extractor.sampling_rate
    longest = round(seconds * rate)
    if start is None:
        spare = max(0, num_samples - longest)
        first = {"center": spare // 2, "end": spare}.get(extractor.truncation, 0)
    elif 0 <= start < duration:
        first = min(round(start * rate), num_samples - 1)
    else:
        raise ValueError(f"{path}: it lasts {duration:g} s; the part that the model sees cannot start at {start:g} s.")
    shown = replace(record, array=record.array[:, first : first + longest])
    try:
        extractor(shown)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    leads = "all 12 leads" if len(record.lead_names) == 12 else f"leads {', '.join(record.lead_names)}"
    facts = [f"{leads}, {rate:g} Hz, {duration:.4g} s"]
    absent = [lead for lead in extractor.lead_names if lead not in record.lead_names]
    derived = [lead for lead in absent if lead in LIMB_LEADS and {"I", "II"} <= set(record.lead_names)]
    if derived:
        facts.append(f"{', '.join(derived)} derived from I and II")
    if len(derived) < len(absent):
        facts.append(f"{', '.join(lead for lead in absent if lead not in derived)} missing")
    unused = [lead for lead in record.lead_names if lead not in extractor.lead_names]
    if unused:
        facts.append(f"{', '.join(unused)} not read by the model")
    quality = lead_quality(record)
    for flag in sorted({flag for flags in quality.values() for flag in flags}):
        facts.append(f"{flag}: {', '.join(lead for lead, flags in quality.items() if flag in flags)}")
    if shown.array.shape[1] < num_samples:
        stop = first / rate + shown.array.shape[1] / rate
        facts.append(f"the model sees {first / rate:.4g} to {stop:.4g} s")
    if shown.array.shape[1] < longest - 1:
        facts.append(f"shorter than the {seconds:g} s that the model takes, which are padded")
    return ShownECG(path.name, shown, ". ".join(["; ".join(facts), *warnings]))


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """What reading an ECG warns of, to be said where the user looks."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(ecg_utils.__name__)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def zeroed(ecg: ShownECG) -> ShownECG:
    """The ECG with every sample 0 mV."""
    return replace(ecg, record=replace(ecg.record, array=np.zeros_like(ecg.record.array)))


def user_turn(text: str, ecgs: list[ShownECG]) -> dict[str, Any]:
    """A user message: the ECGs, then the text."""
    parts: list[dict[str, Any]] = [{"type": "ecg", "ecg": ecg.record} for ecg in ecgs]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


class PromptCache:
    """The keys and values of what the model has read and written in one conversation.

    The next prompt, which mostly repeats it, is read from where it differs on. Of an ECG only placeholders are compared: a
    conversation with other ECGs needs a cache of its own.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.values: DynamicCache | None = None

    def begin(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `generate` that go on from what is cached: ECGs that it holds are left out."""
        ids = inputs["input_ids"][0].tolist()
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids[:-1], strict=False)))
        held, self.ids = self._cut(same, ids[:same].count(model.config.ecg_token_id), model), []
        if self.values is None:
            self.values = DynamicCache(config=model.config.get_text_config(decoder=True))
            held = 0
        if held:
            ecg_names = [name for name in inputs if name not in ("input_ids", "attention_mask")]
            rest = {name: inputs[name][held:] for name in ecg_names}
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            inputs |= {name: values for name, values in rest.items() if len(values)}
        return {**inputs, "past_key_values": self.values}

    def _cut(self, same: int, num_placeholders: int, model: PreTrainedModel) -> int:
        """Cuts the cache to its first `same` tokens, or drops it; returns the ECGs that it holds."""
        held, partial = divmod(num_placeholders, model.config.num_ecg_tokens or 1)
        if self.values is not None:
            try:
                self.values.crop(same - self.values.get_seq_length())
            except RuntimeError:  # a sliding window has forgotten what would come back
                self.values = None
        if partial or not same:
            self.values = None
        return held

    def end(self, sequence: list[int]) -> None:
        """Remembers which tokens the cache holds, of those of a whole generation."""
        assert self.values is not None
        self.ids = sequence[: self.values.get_seq_length()]


def stream_answer(
    model: PreTrainedModel,
    processor: Any,
    chat: list[dict[str, Any]],
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    temperature: float = 0.0,
    cache: PromptCache | None = None,
) -> Generator[str, None, None]:
    """The answer to the last turn of the chat, piece by piece; closing the iterator stops the model.

    Args:
        temperature: 0 for the likeliest words, as in `elm evaluate`.
        cache: of this conversation.

    Raises:
        ValueError: the chat is no input of the model, or leaves no room in its context.
    """
    inputs: Any = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = dict(inputs.to(model.device))
    length = inputs["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    room = max_new_tokens if context is None else min(max_new_tokens, context - length)
    if room < 1:
        raise ValueError(
            f"The conversation has {length} tokens and the model reads {context}: begin a new one, or ask a shorter question."
        )
    if cache is not None:
        inputs = cache.begin(model, inputs)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = Event()
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.inference_mode():
                output: Any = model.generate(  # type: ignore[operator]
                    **inputs,
                    **sampling,
                    max_new_tokens=room,
                    repetition_penalty=1.0,  # as in `elm evaluate`
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
                )
            if cache is not None:
                cache.end(output[0].tolist())
        except BaseException as error:  # the reader would wait for ever
            errors.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        started = False
        for piece in streamer:
            piece = piece if started else piece.lstrip()
            if piece:
                started = True
                yield piece
    finally:
        stopped.set()
        thread.join()
    if errors:
        raise errors[0]


class _Stop:
    """Ends a generation when its event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how it answers."""
    parser.add_argument("model", metavar="MODEL", help="saved ELM or LoRA adapter: local folder or Hub id")
    parser.add_argument("--revision", default="main", help="of a Hub id; default: %(default)s")
    parser.add_argument(
        "--max_new_tokens",
        type=_positive,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="TOKENS",
        help="longest answer; default: %(default)s",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        help="draw the words at this temperature; default: 0, the likeliest words",
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn words; default: %(default)s")
    parser.add_argument("--system_prompt", metavar="TEXT", help="system message, or a file that holds it")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the model; default: %(default)s, as it was saved",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value
