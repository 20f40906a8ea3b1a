"""Tokens of a model to the text of its answer, piece by piece: what `ELMProcessor.decode_answers` makes of all of them."""

from collections.abc import Iterable, Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a letter whose other bytes are in the next token


class Detokenizer:
    """The text of tokens that come one by one, without special tokens.

    Args:
        tokenizer: of the language model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []  # from the last token on whose text was told
        self._told = 0  # how many of them are told

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add; nothing as long as a letter is not whole."""
        self._ids += token_ids
        # behind the token before them, as some tokenizers write the first token of a text without its space
        before, now = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return now[len(before) :]

    def end(self) -> str:
        """What was not told yet."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._told])) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True) if token_ids else ""


class AnswerText:
    """What of a text that comes piece by piece is the answer: without what every answer opens with and the white space round it, with
    what the model was given of it, and up to the first stop text.

    Args:
        opening, given: `answer_opening` and `given_answer` of the processor.
        stop: texts that end the answer, and are none of it.

    `stopped` tells that one of them has come; what is pushed behind it is ignored.
    """

    def __init__(self, opening: str = "", given: str = "", stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.stopped = False
        self._opening, self._given = opening, given  # nothing once they are past
        self._begun = False  # whether a letter of the answer has come
        self._held = ""  # what may be a part of the opening or of a stop text, or white space at the end

    def push(self, text: str) -> str:
        """What the text adds to the answer."""
        if self.stopped:
            return ""
        self._held += text
        before = self._begin()
        if not self._begun:
            return ""
        places = [place for place in map(self._held.find, self.stop) if place >= 0]
        if places:
            self.stopped = True
            return before + self._held[: min(places)].rstrip()
        kept = max((_overlap(self._held, one) for one in self.stop), default=0)
        told = self._held[: len(self._held) - kept].rstrip()
        self._held = self._held[len(told) :]
        return before + told

    def end(self) -> str:
        """What was held back, once nothing more comes."""
        return "" if self.stopped else self._begin(ended=True) + self._held.rstrip()

    def _begin(self, ended: bool = False) -> str:
        """Takes the opening away; what the model was given of the answer, when its first letter has come."""
        if self._begun:
            return ""
        self._held = self._held.lstrip()
        if self._opening and self._held.startswith(self._opening):
            self._held = self._held.removeprefix(self._opening).lstrip()
            self._opening = self._given = ""
        # what has come may still become the opening
        self._begun = bool(self._held) and (ended or not self._opening.startswith(self._held))
        return self._given if self._begun else ""


def _overlap(text: str, word: str) -> int:
    """How many letters at the end of a text the word may begin with."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)
