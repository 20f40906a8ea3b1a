"""The chats of a benchmark suite: the questions, their options, and the facts that scores need."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a suite and its right answer.

    Args:
        options: among which it is answered, where the suite names them.
        facts: what else its score needs, such as the step of a chain that it is.
    """

    question: str
    answer: str
    question_type: str
    options: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chat:
    """Questions about the same record or records, each asked after the right answers to those before it.

    Args:
        records: their names, as the suite has them.
    """

    records: tuple[str, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class SuiteOptions:
    """What a run says of all of its suites: `split`, and whether options are shown that a suite could leave out."""

    split: str = "test"
    show_options: bool = False
