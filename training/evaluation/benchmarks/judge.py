"""A language model that judges the answers of a suite, behind an OpenAI-compatible address: `--judge_url` and `--judge_model`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_ecg.training.evaluation.benchmarks.chats import Turn
from elm_ecg.training.evaluation.benchmarks.endpoint import AT_ONCE, Endpoint

JUDGE_FILE = "judge.jsonl"
KEY_VARIABLE = "ELM_JUDGE_API_KEY"  # not that of --endpoint: each address sees its own key alone
MAX_NEW_TOKENS = 1024


class Judge:
    """Asks a language model, greedily, how good answers are, and keeps each of its replies in a file.

    A reply is found again by the model and the prompt, which holds the question's right answer and the answer that is judged: a run that goes
    on, a condition with the same answer and a repeated command ask for nothing twice.

    Args:
        file: JSON Lines, a digest, the prompt and the reply in each; whole lines alone are read.
        told: what it is told before the two texts.
        is_judged, share_of: as `Suite.is_judged` and `Suite.judged_share`.

    `unread` has the digests of the prompts whose replies say no score.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        file: Path,
        told: str,
        is_judged: Callable[[Turn], bool],
        share_of: Callable[[dict[str, Any]], float | None],
    ) -> None:
        self.endpoint, self.file, self.told = endpoint, file, told
        self.is_judged, self.share_of = is_judged, share_of
        self.unread: set[str] = set()
        self._replies: dict[str, str] = {}
        if file.is_file():
            for line in file.read_bytes().split(b"\n"):
                row = _read(line)
                # what another editor or a crash made of a line is asked again
                if row is not None and row.get("key") == self._key(str(row.get("prompt"))):
                    self._replies[row["key"]] = str(row.get("reply"))

    def points(self, turns: Sequence[Turn], answers: Sequence[str]) -> np.ndarray:
        """The judged score of each turn, [turns, 2]: its share of the best, and 1; two zeros where none can be told, as of a turn that is not
        judged. An empty answer has no point, and nobody is asked."""
        points = np.zeros((len(turns), 2))
        judged = [place for place, turn in enumerate(turns) if self.is_judged(turn)]
        points[judged, 1] = 1
        prompts = {place: self.prompt_of(turns[place], answers[place]) for place in judged if answers[place].strip()}
        self._ask(list(dict.fromkeys(prompts.values())))
        for place, prompt in prompts.items():
            key = self._key(prompt)
            said = _read(_object_in(self._replies[key]))
            share = None if said is None else self.share_of(said)
            if share is None:
                self.unread.add(key)
            points[place] = (0, 0) if share is None else (share, 1)
        return points

    def as_json(self) -> dict[str, Any]:
        """What is to be known about the judge, beside its scores."""
        return {
            "url": self.endpoint.url,
            "model": self.endpoint.model,
            "prompt": self.told,
            "replies_without_a_score": len(self.unread),
        }

    def prompt_of(self, turn: Turn, answer: str) -> str:
        """What the judge reads of an answer."""
        return f"{self.told}\n\nThe right text:\n{turn.answer}\n\nThe text to judge:\n{answer}"

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.endpoint.model, prompt]).encode()).hexdigest()

    def _ask(self, prompts: list[str]) -> None:
        missing = [prompt for prompt in prompts if self._key(prompt) not in self._replies]
        for start in range(0, len(missing), AT_ONCE):  # what is said is kept before more is asked
            of_batch = missing[start : start + AT_ONCE]
            chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in of_batch]
            with self.file.open("a", encoding="utf-8") as file:
                for prompt, reply in zip(of_batch, self.endpoint.reply_all(chats, MAX_NEW_TOKENS), strict=True):
                    key = self._key(prompt)
                    self._replies[key] = reply
                    # a line that was cut before does not spoil this one
                    file.write("\n" + json.dumps({"key": key, "prompt": prompt, "reply": reply}))


def _object_in(reply: str) -> str:
    """What stands from the first brace of a reply to its last one: models put words and fences round JSON."""
    return reply[reply.find("{") : reply.rfind("}") + 1]


def _read(text: str | bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
