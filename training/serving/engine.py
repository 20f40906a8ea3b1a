"""What writes the answers of a served ELM: the one interface of all engines."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

import torch

FinishReason = Literal["stop", "length"]


class EngineDownError(RuntimeError):
    """The engine cannot answer now; it may later. Its text is for clients."""


class QueueFullError(RuntimeError):
    """More waits for an answer than may wait.

    Args:
        retry_after: seconds after which it is worth another try.
    """

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Prompt:
    """What the model reads before its answer, as its processor prepared it.

    Args:
        input_ids: tokens of the whole chat, placeholders or tokens of its ECGs among them.
        ecg_inputs: `ECG_INPUTS` of the ECGs of the chat, in their order, each [ECGs, ...]; empty where it has none, or they are tokens.
        adapter: of those that the engine was started with; None: the model itself.
        client: who asks; nobody gets anything of what was read for others, not even its speed.
        stop_token_ids: each ends an answer, and is none of its text if it is a special token.
        opening, given: of the answers, as `AnswerText` takes them.
    """

    input_ids: list[int]
    ecg_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    adapter: str | None = None
    client: str = ""
    stop_token_ids: frozenset[int] = frozenset()
    opening: str = ""
    given: str = ""


@dataclass(frozen=True)
class SamplingOptions:
    """How answers to a prompt are written.

    Args:
        max_new_tokens: the longest answer; prompt and answer fit the context together.
        temperature: 0 for the likeliest tokens.
        top_p: tokens are drawn from the fewest whose probabilities add up to this.
        seed: of drawn tokens. The answer depends on it and its place among the `n` alone; None: other draws each time.
        stop: texts that end an answer, and are none of it.
        n: answers.
        top_logprobs: how many of the likeliest tokens are told at each place, beside the one that was taken; None: no logprobs.
        stream: pieces come as they are written; False: the first one does, then each answer as one piece.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    stream: bool = True


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was written, and those that were likeliest in its place.

    Args:
        text: of the token by itself.
        logprob: its log-probability before temperature and `top_p`.
        top: text and log-probability, the likeliest first.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What came to an answer. The texts of all pieces of a choice are what `ELMProcessor.decode_answers` makes of its tokens.

    Args:
        choice: which of the `n` answers.
        text: may be empty, as where a token is a part of a letter.
        logprobs: of the tokens behind the text, if they were asked for; not of one that ends the answer.
        num_tokens: written since the last piece of this choice, one that ends the answer included.
        num_cached: of the first piece of a prompt: its tokens that the engine had read before.
        finish_reason: of the last piece of a choice: `stop` where the model or a stop text ended it, `length` after
            `max_new_tokens`.
    """

    choice: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    num_tokens: int = 0
    num_cached: int = 0
    finish_reason: FinishReason | None = None


class Engine(ABC):
    """Writes answers to many prompts at once. All methods run in one event loop, which they do not block.

    `context` is the number of tokens that a prompt and its answer may have together; None: any.
    """

    context: int | None = None

    @abstractmethod
    async def start(self) -> None:
        """Makes it ready to answer."""

    @abstractmethod
    def generate(self, prompt: Prompt, options: SamplingOptions) -> AsyncGenerator[Piece, None]:
        """The `n` answers, piece by piece, each up to its `finish_reason`. The first piece, which may be empty, comes as soon as the
        prompt was read. Closing the iterator frees their places at once.

        Raises:
            EngineDownError, QueueFullError: also after some pieces.
            NotFiniteError: the model gives no numbers.
        """

    @abstractmethod
    async def healthy(self) -> bool:
        """Whether it can answer now."""

    @abstractmethod
    async def close(self) -> None:
        """Ends it, and what it still writes; the server has waited for that before."""
