"""The model that a benchmark is run on, whatever its kind: what it is, and what asks it."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.build import new_elm
from elm_ecg.training.data.loading import to_chat
from elm_ecg.training.digest import digest_of_folder, digest_of_model, folder_of
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.benchmarks.baselines import ChatAnswerer, DescribingAnswerer, Message
from elm_ecg.training.evaluation.benchmarks.endpoint import Endpoint
from elm_ecg.training.evaluation.progress import Progress
from elm_ecg.training.evaluation.questions import Question, num_ecgs_of
from elm_ecg.training.load import limit_threads, load_elm
from elm_ecg.training.model_files import find_model_file

OF_DESCRIPTION = 250  # tokens that are kept free for what is said of an ECG
# rows, questions, candidates of each (None: it writes its answers) and options of `generate` -> what asks
MakeAnswerer = Callable[[Dataset, list[Question], list[list[str]] | None, dict[str, Any]], Any]


def that_fit(data: Dataset, questions: list[Question], processor: ELMProcessor, max_new_tokens: int) -> list[bool]:
    """Of each question whether it fits the context of a model, with the chat before it and the answer to come."""
    if processor.max_length is None:
        return [True] * len(questions)
    of_ecg = processor.num_ecg_tokens if processor.takes_ecgs else OF_DESCRIPTION
    room_of = (processor.max_length - max_new_tokens - of_ecg * num_ecgs_of(data)).tolist()
    fits, rows = [True] * len(questions), dict[int, list[int]]()
    for place, question in enumerate(questions):
        rows.setdefault(question.row, []).append(place)
    for row, places in rows.items():
        messages = data[row]["messages"]
        if 2 * sum(len(message["content"]) for message in messages) <= room_of[row]:
            continue  # a token has a character at least, and the template adds few
        for place in places:
            chat = to_chat({"messages": messages[: questions[place].turn]})
            text: Any = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            fits[place] = len(processor.tokenizer(text)["input_ids"]) <= room_of[row]
    return fits


@dataclass
class FittingAnswerer:
    """Asks the questions that fit the context of a model, of which `answerer` has no others; the others are answered with nothing.

    Args:
        fits: of each question whether it does.
    """

    answerer: Answerer
    fits: list[bool]

    @property
    def data(self) -> Dataset:
        """The rows of the questions."""
        return self.answerer.data

    @property
    def notices(self) -> dict[str, set[tuple[int, int]]]:
        """As of `Answerer`."""
        return self.answerer.notices

    def ask(self, name: str, progress: Progress | None = None) -> tuple[list[str], str | None]:
        """As `Answerer.ask`, with empty answers where a question does not fit."""
        answers, reason = self.answerer.ask(name, progress)
        if reason is not None:
            return [], reason
        given = iter(answers)
        return [next(given) if fit else "" for fit in self.fits], None


@dataclass
class Contender:
    """A model that answers.

    Args:
        revision: by which its answers are known again.
        likelihoods: whether it says how likely an answer is.
        thinks: whether its answers begin with thinking, which is no part of what is scored.
    """

    name: str
    revision: str
    dtype: str
    system_prompt: str | None
    make_answerer: MakeAnswerer
    likelihoods: bool = True
    thinks: bool = False


def open_contender(args: Namespace) -> Contender:
    """The model of the command line.

    Raises:
        ValueError: it cannot be loaded, or an option does not go with its kind.
    """
    if args.endpoint is not None:
        return _endpoint(args)
    place, file = find_model_file(args.model, ["adapter_config.json", "config.json"], args.model_revision)
    if file == "adapter_config.json":
        return _elm(args)
    kind = AutoConfig.from_pretrained(place, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
    if kind.model_type == ELMConfig.model_type:
        return _elm(args)
    if args.describe:
        return _language_model(args)
    if kind.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return _image_text_model(args)
    raise ValueError(
        f"The model {args.model} ({kind.model_type}) reads texts alone; say --describe, which tells it the ECG in words."
    )


def _elm(args: Namespace) -> Contender:
    if args.describe:
        raise ValueError(
            f"--describe tells a language model the ECG in words, and {args.model} is an ELM; leave it out."
        )
    model, processor = load_elm(args.model, args.model_revision, args.trust_remote_code, dtype=args.dtype)
    revision = digest_of_folder(folder_of(args.model, args.model_revision))
    return _of_elm(args, model, processor, revision, Answerer)


def _language_model(args: Namespace) -> Contender:
    """A language model as the ELM that it is the text part of: without an ECG in it."""
    options = {"architecture": "text", "representation": "signal", "trust_remote_code": args.trust_remote_code}
    model, processor = new_elm(args.model, dtype=args.dtype, revision=args.model_revision, **options)
    return _of_elm(args, model, processor, digest_of_model(model, processor), DescribingAnswerer)


def _of_elm(args: Namespace, model: Any, processor: Any, revision: str, kind: type[Answerer]) -> Contender:
    state = PartialState()
    model.to(state.device).eval()
    limit_threads(model, state.device)
    processor = processor.with_system_prompt(args.system_prompt)

    def make(data: Dataset, questions: list[Question], choices: Any, generation: dict[str, Any]) -> Any:
        fits = that_fit(data, questions, processor, generation["max_new_tokens"])
        asked = [question for question, fit in zip(questions, fits, strict=True) if fit]
        if choices is not None and len(asked) < len(questions):
            raise ValueError(
                f"{len(questions) - len(asked):,} of {len(questions):,} questions are too long for {args.model}, which reads "
                f"{processor.max_length:,} tokens; leave the suite out."
            )
        answerer = kind(model, processor, data, asked, choices, args.batch_size, generation, args.seed)
        return answerer if len(asked) == len(questions) else FittingAnswerer(answerer, fits)

    dtype = str(model.dtype).removeprefix("torch.")
    return Contender(
        _name(args.model), revision, dtype, processor.system_prompt, make, thinks=processor.explicit_thinking
    )


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else Path(model).name


def _image_text_model(args: Namespace) -> Contender:
    options = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    processor = AutoProcessor.from_pretrained(args.model, **options)
    processor.tokenizer.padding_side = "left"  # all prompts of a batch end where the answer begins
    # wants attributes that no model declares
    model: Any = AutoModelForImageTextToText.from_pretrained(
        args.model, dtype=args.dtype, use_safetensors=True, **options
    )
    model.to(PartialState().device).eval()

    def make(data: Dataset, questions: list[Question], choices: Any, generation: dict[str, Any]) -> ChatAnswerer:
        def reply(chats: list[list[Message]]) -> list[str]:
            inputs = processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(model.device)
            with torch.inference_mode():
                written = model.generate(**inputs, **generation)
            new = written[:, inputs["input_ids"].shape[1] :]
            return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

        return ChatAnswerer(data, questions, reply, args.batch_size, args.seed, False, args.system_prompt)

    folder = Path(args.model)
    revision = digest_of_folder(folder if folder.is_dir() else folder_of(args.model, args.model_revision))
    dtype = str(model.dtype).removeprefix("torch.")
    return Contender(_name(args.model), revision, dtype, args.system_prompt or None, make, likelihoods=False)


def _endpoint(args: Namespace) -> Contender:
    endpoint = Endpoint(args.endpoint, args.model)

    def make(data: Dataset, questions: list[Question], choices: Any, generation: dict[str, Any]) -> ChatAnswerer:
        def reply(chats: list[list[Message]]) -> list[str]:
            return endpoint.reply_all(chats, generation["max_new_tokens"])

        return ChatAnswerer(data, questions, reply, args.batch_size, args.seed, args.describe, args.system_prompt)

    # nobody can tell whether the weights behind an address are still the same
    facts = json.dumps(["endpoint", args.endpoint, args.model])
    revision = f"sha256:{hashlib.sha256(facts.encode()).hexdigest()}"
    return Contender(_name(args.model), revision, "unknown", args.system_prompt or None, make, likelihoods=False)
