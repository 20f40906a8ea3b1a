"""Reading ECGs for a loaded ELM, and its streamed answers: what `elm chat` and `elm demo` share.

It travels into Spaces too, so it imports no training library, and of this package only what travels with it.
"""

import argparse
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer, set_seed

from elm_ecg.ecg_utils import ECGRecord, lead_quality, read_ecg
from elm_ecg.training.command_line import CommandLineParser, add_model_options, read_system_prompt

DISCLAIMER = (
    "Research software, not a medical device. Nothing that the model says may be used for the care of a patient."
)
DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class ChatECG:
    """An ECG of a conversation.

    Args:
        name: of its file.
        record: the whole record; its metadata may name the `start` of the part that the model reads.
        prepared: that part, in millivolts: for people to look at.
        facts: sentences about the record and what the model reads of it.
    """

    name: str
    record: ECGRecord
    prepared: ECGRecord
    facts: str


def read_for_model(processor: Any, path: Path, start: float | None = None, **described: Any) -> ChatECG:
    """Reads an ECG file, and prepares what the model reads of it.

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
    extractor = processor.feature_extractor
    if not hasattr(extractor, "prepare"):  # a Space runs the processor's code of the model's repo
        raise ValueError("The model's code is older than this program: save it again with the present elm-ecg.")
    record = read_ecg(path, **described)
    if start is None and not extractor.truncation:  # where a longer record would be an error
        start = 0.0
    if start is not None:
        record = replace(record, metadata={**record.metadata, "start": start})  # the processor prepares it from there
    try:
        prepared = extractor.prepare(record, normalize=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    about, duration = facts_of(record), record.array.shape[1] / record.sampling_rate
    begin, num_samples = prepared.metadata["start_second"], prepared.array.shape[1]
    span = (begin, begin + num_samples / prepared.sampling_rate, duration)
    reads = "The model reads {} to {} s of {} s.".format(*(f"{round(second, 3):.12g}" for second in span))
    return ChatECG(path.name, record, prepared, " ".join([about[0], reads, *about[1:], *prepared.metadata["notices"]]))


def facts_of(record: ECGRecord) -> list[str]:
    """Sentences about a record: its leads, rate and length, then what is wrong with leads."""
    leads = "all 12 leads" if len(record.lead_names) == 12 else f"leads {', '.join(record.lead_names)}"
    duration = record.array.shape[1] / record.sampling_rate
    facts = [f"{leads}, {record.sampling_rate:g} Hz, {duration:.4g} s."]
    quality = lead_quality(record)
    for flag in sorted({flag for flags in quality.values() for flag in flags}):
        facts.append(f"{flag.capitalize()}: {', '.join(lead for lead, flags in quality.items() if flag in flags)}.")
    return facts


def zeroed(ecg: ChatECG) -> ChatECG:
    """The ECG with every sample 0 mV."""
    return replace(ecg, record=replace(ecg.record, array=np.zeros_like(ecg.record.array)))  # what people look at stays


def as_message(role: str, text: str, ecgs: Sequence[ChatECG] = ()) -> dict[str, Any]:
    """A message of a chat: its ECGs, then its text."""
    parts: list[dict[str, Any]] = [{"type": "ecg", "ecg": ecg.record} for ecg in ecgs]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


class PromptCache:
    """The keys and values of what the model has read and written in one conversation.

    The next prompt, which mostly repeats it, is read from where it differs on. Of an ECG only placeholders are compared: a
    conversation with other ECGs needs a cache of its own.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.values: DynamicCache | None = None

    def begin(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `generate` that continue from the cache, without the ECGs that it holds."""
        ids = inputs["input_ids"][0].tolist()  # a batch of one
        # without the last token: the model has to read one to go on
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids[:-1], strict=False)))
        held, self.ids = self._cut(same, ids[:same].count(model.config.ecg_token_id), model), []
        if self.values is None:
            self.values = DynamicCache(config=model.config.get_text_config(decoder=True))
            held = 0
        if held:
            ecg_names = [name for name in inputs if name not in ("input_ids", "attention_mask")]
            new = {name: inputs[name][held:] for name in ecg_names}  # one row an ECG, in the order of the chat
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            inputs |= {name: values for name, values in new.items() if len(values)}
        return {**inputs, "past_key_values": self.values}  # no ids until `end`: after a failure all is read anew

    def _cut(self, same: int, num_placeholders: int, model: PreTrainedModel) -> int:
        """Cuts the cache to its first `same` tokens, or drops it; returns the ECGs that it holds."""
        held, partial = divmod(num_placeholders, model.config.num_ecg_tokens or 1)
        if self.values is not None:
            try:
                self.values.crop(same - self.values.get_seq_length())  # below 0: tokens to take away
            except RuntimeError:  # a sliding window has forgotten what would come back
                self.values = None
        if partial or not same:  # an ECG is in the cache as a whole or not at all
            self.values = None
        return held

    def end(self, sequence: list[int]) -> None:
        """Remembers which tokens the cache holds, of those of a whole generation."""
        assert self.values is not None
        self.ids = sequence[: self.values.get_seq_length()]  # the last token was written, but not read


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
    # the answer may be no longer than what is left of the model's context
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
    stopped = Event()  # stopping criteria are asked after each token, in the other thread
    errors: list[BaseException] = []

    # the model writes in a thread of its own, and the streamer is the queue between it and the reader
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
        except BaseException as error:  # raised again below, where the reader is
            errors.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)  # after an error too: the reader waits for it

    thread = Thread(target=generate, daemon=True)  # does not hold up the end of the process
    thread.start()
    try:
        opening, begun, started = processor.answer_opening, "", False
        given = getattr(processor, "given_answer", "")  # which code saved before there was one lacks
        for piece in streamer:
            if not started:
                begun = (begun + piece).lstrip()  # no blanks before the answer
                is_opened = bool(opening) and begun.startswith(opening)
                piece = begun.removeprefix(opening).lstrip()
                started = bool(piece) and not opening.startswith(begun)  # it may still become the opening
                piece = piece if is_opened else given + piece
            if started:
                yield piece
        if not started and begun != opening and begun:  # an answer that begins as the opening does, and ends
            yield begun
    finally:
        stopped.set()  # of a reader who closed the iterator
        thread.join()  # it stops after the next token
    if errors:
        raise errors[0]


class _Stop:
    """Ends a generation when its event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)  # [batch]


def load_model(args: argparse.Namespace) -> tuple[PreTrainedModel, Any, str]:
    """The model of `model_parser` on the GPU, if there is one, its processor, and its name for people."""
    # late: --help need not wait for it, and a Space has no such module
    from elm_ecg.training.load import limit_threads, load_elm, warn_if_untuned

    system_prompt = read_system_prompt(args.system_prompt)
    set_seed(args.seed)
    model, processor = load_elm(args.model, args.revision, args.trust_remote_code, dtype=args.dtype)
    warn_if_untuned(processor)
    if system_prompt is not None:
        processor.system_prompt = system_prompt
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]  # a wrapped method
    limit_threads(model, model.device)
    return model, processor, Path(args.model).name if Path(args.model).exists() else args.model


def model_parser(verb: str, purpose: str | None) -> argparse.ArgumentParser:
    """The options of a command that asks a model: which one, and how it answers."""
    usage, description = f"elm {verb} [MODEL] [options]", f"{purpose} {DISCLAIMER}"
    parser = CommandLineParser(prog=f"elm {verb}", usage=usage, description=description)
    model_help = "saved ELM or LoRA adapter: local folder or Hub id; with --server the name of one that is served there"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=model_help)
    server_help = "address of `elm serve`, which is asked in place of a model here: http://127.0.0.1:8000"
    parser.add_argument("--server", metavar="URL", help=server_help)
    parser.add_argument("--api_key", metavar="KEY", help="of the server; default: ELM_API_KEY of the environment")
    add_model_options(parser, DEFAULT_MAX_NEW_TOKENS)
    temperature_help = "draw the words at this temperature; default: 0, the likeliest words"
    parser.add_argument("--temperature", type=_temperature, default=0.0, help=temperature_help)
    parser.add_argument("--seed", type=int, default=0, help="of drawn words; default: %(default)s")
    return parser


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value
