"""Tiny ELMs of each representation, chats to ask them, and what `elm predict` answers: what the tests of serving share."""

import asyncio
import base64
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elm_ecg.modeling_elm import ECG_INPUTS, ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.conditions import CONDITIONS, ECG
from elm_ecg.training.evaluation.questions import Question
from elm_ecg.training.serving.engine import Piece, Prompt, SamplingOptions
from helpers import (
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_llm_config,
    tiny_processor,
    tiny_symbolic_processor,
)

REPRESENTATIONS = ["signal", "symbolic", "rgb", "stacked_signal"]


@functools.cache
def make(representation: str = "signal", family: str = "llama3") -> tuple[ELMForConditionalGeneration, Any]:
    """A random ELM whose answers depend on what it reads, and its processor, of records of 2 s or 5 s."""
    if representation == "signal":
        processor: Any = tiny_processor(family)
    elif representation == "symbolic":
        processor = tiny_symbolic_processor(family)
    else:
        processor = tiny_image_processor_elm("vit", representation)
    settings = {"max_position_embeddings": 8192, "initializer_range": 0.3, "tie_word_embeddings": False}
    llm = tiny_llm_config(family, vocab_size=len(processor.tokenizer), **settings)
    if representation == "symbolic":
        config = tiny_elm_config(None, llm=llm, representation="symbolic")
    elif representation == "signal":
        config = tiny_elm_config(llm=llm, ecg_token_id=processor.ecg_token_id)
    else:
        config = tiny_image_elm_config("vit", representation, llm=llm, ecg_token_id=processor.ecg_token_id)
    torch.manual_seed(0)
    model = ELMForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = processor.stop_token_ids
    with torch.no_grad():
        for part in (model.model.connector, model.model.signal_embeddings):
            if part is not None:
                for parameter in part.parameters():
                    parameter.normal_(std=0.5)
    return model, processor


def ecg(seed: int, seconds: float = 2.0) -> dict[str, Any]:
    """A record of 12 leads at 250 Hz, as a part of a request has it."""
    walk = np.random.default_rng(seed).normal(0, 0.02, (12, round(250 * seconds))).cumsum(1)
    return {"samples": walk.astype(np.float32).tolist(), "sampling_rate": 250, "unit": "mV"}


def ecg_part(seed: int, seconds: float = 2.0) -> dict[str, Any]:
    return {"type": "ecg", "ecg": ecg(seed, seconds)}


def turn(*parts: Any, role: str = "user") -> dict[str, Any]:
    """A message of texts and parts."""
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def chats(seconds: float = 2.0) -> list[list[dict[str, Any]]]:
    """Chats of 0, 1 and 2 ECGs and of one or several turns."""
    one, two = ecg_part(1, seconds), ecg_part(2, seconds)
    answered = [turn(one, "Why?"), turn("no", role="assistant")]
    return [
        [turn(one, "Is the rate fast?")],
        [turn("What is an ECG?")],
        [turn(one, two, "Which is slower, and why is that so?")],
        [*answered, turn("Are you sure?")],
        [turn("Be brief.", role="system"), turn(two, "Rhythm?")],
        [*answered, turn(two, "And here?")],
    ]


def predicted(model: Any, processor: Any, asked: list[list[dict[str, Any]]], max_new_tokens: int) -> list[str]:
    """What `elm predict` writes about chats, one by one."""
    rows = []
    for chat in asked:
        ecgs = [part["ecg"] for message in chat for part in message["content"] if part["type"] == "ecg"]
        records = [
            {"array": np.array(one["samples"]), **{k: one[k] for k in ("sampling_rate", "unit")}} for one in ecgs
        ]
        messages = [
            {**message, "content": [part if part["type"] == "text" else {"type": "ecg"} for part in message["content"]]}
            for message in chat
        ]
        rows.append({"messages": messages, "ecg": records})
    questions = [Question(row, len(chat), "", "", "", "") for row, chat in enumerate(asked)]
    answerer = Answerer(model, processor, rows, questions, None, 1, {"max_new_tokens": max_new_tokens})
    answers: dict[int, str] = {}
    for number, batch in enumerate(answerer.batches):
        answers[batch[0][0]] = answerer.answer_batch(batch, CONDITIONS[ECG], number)[0]
    return [answers[row] for row in range(len(rows))]


def prompt_of(processor: Any, chat: list[dict[str, Any]], **settings: Any) -> Prompt:
    """A chat as an engine takes it."""
    records = [
        {
            **message,
            "content": [
                part
                if part["type"] == "text"
                else {"type": "ecg", "ecg": np.array(part["ecg"]["samples"]), "sampling_rate": 250}
                for part in message["content"]
            ],
        }
        for message in chat
    ]
    inputs = processor.apply_chat_template(
        records, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ecgs = {name: inputs[name] for name in ECG_INPUTS if name in inputs}
    stop = frozenset(processor.stop_token_ids)
    return Prompt(
        inputs["input_ids"][0].tolist(), ecgs, stop_token_ids=stop, opening=processor.answer_opening, **settings
    )


async def collect(engine: Any, prompt: Prompt, options: SamplingOptions, delay: float = 0.0) -> list[list[Piece]]:
    """The pieces of each answer."""
    await asyncio.sleep(delay)
    choices: list[list[Piece]] = [[] for _ in range(options.n)]
    async for piece in engine.generate(prompt, options):
        choices[piece.choice].append(piece)
    return choices


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def as_data(path: Path) -> dict[str, Any]:
    """A file as a part of a message."""
    content = base64.b64encode(path.read_bytes()).decode()
    return {"type": "ecg", "ecg": {"data": content, "format": path.suffix[1:]}}
