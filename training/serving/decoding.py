"""A batch of answers that are written side by side, a token of each at a time; answers come and go between the steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import NotFiniteError, require_finite
from elm_ecg.training.sampling import drawn_tokens, warpers_of
from elm_ecg.training.serving.caches import merge, row_of, trim
from elm_ecg.training.serving.engine import FinishReason, Piece, Prompt, SamplingOptions, TokenLogprob
from elm_ecg.training.serving.pieces import AnswerText, Detokenizer
from elm_ecg.training.serving.prefixes import KeysAndValues, Read

MIN_TEMPERATURE = 1e-5  # below it the likeliest token is drawn anyway, and scores overflow


class Answer:
    """One of the answers to a prompt, as it is written.

    Args:
        owner: who gets its pieces.
        read: the prompt, as it is kept for the next turn.
        num_cached: tokens of the prompt that were read before.
        choice: which of the answers to the prompt.
        seed: of its drawn tokens, with `choice`.
        tokenizer: of the language model.
        processors: what changes the scores of its tokens.
    """

    def __init__(
        self,
        owner: Any,
        prompt: Prompt,
        options: SamplingOptions,
        read: Read,
        num_cached: int,
        choice: int,
        seed: int,
        tokenizer: Any,
        processors: LogitsProcessorList,
    ) -> None:
        self.owner, self.prompt, self.options, self.read, self.choice = owner, prompt, options, read, choice
        self.tokenizer, self.processors = tokenizer, processors
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._random = np.random.default_rng([seed, choice])
        self._detokenizer = Detokenizer(tokenizer)
        self._answer = AnswerText(prompt.opening, prompt.given, options.stop)
        self._text = ""  # not told yet, and so the others
        self._logprobs: list[TokenLogprob] = []
        self._told = 0
        self.num_cached = num_cached

    @property
    def shape(self) -> tuple[float, float]:
        """Temperature and `top_p`; (0, 1) where the likeliest token is taken."""
        options = self.options
        return (options.temperature, options.top_p) if options.temperature >= MIN_TEMPERATURE else (0.0, 1.0)

    def draw(self) -> float:
        """The next of its random numbers."""
        return self._random.random()

    def take(self, token_id: int, logits: torch.Tensor) -> None:
        """Adds a token, of which the model gave these logits [vocabulary]."""
        self.ids.append(token_id)
        # one that ends the answer too: where it is no special token, `decode_answers` leaves it in the text
        self._text += self._answer.push(self._detokenizer.push([token_id]))
        is_end = token_id in self.prompt.stop_token_ids
        if self.options.top_logprobs is not None and not is_end:
            self._logprobs.append(self._logprob(token_id, logits))
        if is_end or self._answer.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.options.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self._text += self._answer.push(self._detokenizer.end()) + self._answer.end()

    def piece(self) -> Piece | None:
        """What came since the last piece, if it is to be told now."""
        is_first = self.choice == 0 and not self._told  # tells that the answer has begun
        if not (is_first or self.finish_reason or (self.options.stream and (self._text or self._logprobs))):
            return None
        piece = Piece(
            choice=self.choice,
            text=self._text,
            logprobs=tuple(self._logprobs),
            num_tokens=len(self.ids) - self._told,
            num_cached=0 if self._told else self.num_cached,
            finish_reason=self.finish_reason,
        )
        self._text, self._logprobs, self._told = "", [], len(self.ids)
        return piece

    def _logprob(self, token_id: int, logits: torch.Tensor) -> TokenLogprob:
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(min(self.options.top_logprobs or 0, len(logprobs)))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenLogprob(
            self.tokenizer.decode([token_id]),
            logprobs[token_id].item(),
            tuple((self.tokenizer.decode([other]), value) for other, value in likeliest),
        )


@dataclass
class Part:
    """Answers whose prompts were read together.

    Args:
        cache: what was read.
        mask: [answers, tokens], 0 for padding.
        logits: [answers, vocabulary], of the next tokens.
    """

    answers: list[Answer]
    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor


class Batch:
    """Answers that are written side by side.

    Args:
        suppressed: tokens that are never written.
    """

    def __init__(self, model: ELMForConditionalGeneration, suppressed: Sequence[int]) -> None:
        self.model = model
        self.answers: list[Answer] = []
        size = model.config.text_config.vocab_size  # tokens of ECGs may lie beyond it, and have no scores
        known = [token_id for token_id in suppressed if token_id < size]
        self._suppressed = torch.tensor(known, dtype=torch.long, device=model.device)
        self._cache: Any = None
        self._mask = torch.empty(0, 0, dtype=torch.long, device=model.device)  # [answers, tokens], 0 for padding
        self._logits: Any = None  # [answers, vocabulary], of the next tokens

    def join(self, joining: Sequence[Part]) -> None:
        """Adds answers; the caches are the batch's from now on."""
        parts = [*joining]
        if self.answers:
            parts.insert(0, Part(self.answers, self._cache, self._mask, self._logits))
        longest = max(part.mask.shape[1] for part in parts)
        self.answers = [answer for part in parts for answer in part.answers]
        self._cache = merge([part.cache for part in parts], longest) if len(parts) > 1 else parts[0].cache
        self._mask = torch.cat([pad(part.mask, (longest - part.mask.shape[1], 0)) for part in parts])
        self._logits = torch.cat([part.logits for part in parts])

    def write(self) -> dict[int, NotFiniteError]:
        """Chooses the next token of each answer. Returns, by their places, why some have none."""
        scores = self._logits.float()  # a copy only where it is no float32
        faults = _faults(scores)
        if len(self._suppressed):
            scores = scores.index_fill(1, self._suppressed, -torch.inf)
        for row, answer in enumerate(self.answers):
            if answer.processors:
                ids = torch.tensor([answer.prompt.input_ids + answer.ids], device=scores.device)
                scores[row] = answer.processors(ids, scores[row : row + 1].clone())[0]  # type: ignore[arg-type]
        tokens = scores.argmax(-1)
        shapes: dict[tuple[float, float], list[int]] = {}
        for row, answer in enumerate(self.answers):
            if row not in faults:
                shapes.setdefault(answer.shape, []).append(row)
        for (temperature, top_p), rows in shapes.items():
            if temperature:
                warpers = warpers_of({"temperature": temperature, "top_p": top_p, "top_k": 0})
                warped: Any = warpers(tokens, scores[rows])  # type: ignore[arg-type]
                draws = torch.tensor([self.answers[row].draw() for row in rows], dtype=torch.float64)
                tokens[rows] = drawn_tokens(warped, draws)
        for row, (answer, token_id) in enumerate(zip(self.answers, tokens.tolist(), strict=True)):
            if row not in faults:
                answer.take(token_id, self._logits[row])
        return faults

    def leave(self, rows: Sequence[int]) -> None:
        """Takes the answers in these places away, and columns that are padding for all that stay."""
        stay = [row for row in range(len(self.answers)) if row not in set(rows)]
        self.answers = [self.answers[row] for row in stay]
        if not stay:
            self._cache, self._mask, self._logits = None, self._mask.new_empty(0, 0), None
            return
        index = torch.tensor(stay, device=self._mask.device)
        self._cache.reorder_cache(index)
        self._mask, self._logits = self._mask[index], self._logits[index]
        padding = int(self._mask.argmax(1).min())  # where the first token of the longest row stands
        if padding:
            trim(self._cache, padding)
            self._mask = self._mask[:, padding:]

    def read(self) -> None:
        """Reads the tokens that were written last."""
        self._mask = pad(self._mask, (0, 1), value=1)
        output = self.model(
            input_ids=torch.tensor([[answer.ids[-1]] for answer in self.answers], device=self._mask.device),
            attention_mask=self._mask,
            position_ids=self._mask.sum(-1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._logits = output.logits[:, -1]

    def read_of(self, row: int) -> KeysAndValues:
        """The keys and values of what was read of an answer and its prompt: all but the last token."""
        return row_of(self._cache, row, self._mask[row].bool())


def _faults(scores: torch.Tensor) -> dict[int, NotFiniteError]:
    try:
        require_finite(scores)
    except NotFiniteError as error:
        finite = torch.isfinite(scores.amax(-1)).tolist()
        return {row: error for row, is_finite in enumerate(finite) if not is_finite}
    return {}
