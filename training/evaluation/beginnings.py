"""What the prompts of several rows begin with, such as a record that many questions are about: it is read once for all of them."""

from collections.abc import Sequence
from itertools import pairwise, zip_longest

import numpy as np

LEAST_SAVED = 0.25  # of all tokens; below that, reading in two steps costs more than it saves


def shared_beginnings(
    prompts: Sequence[Sequence[int]], ecgs: Sequence[tuple[str, ...]], least: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """Groups of prompts that begin alike.

    Args:
        prompts: the tokens of each row.
        ecgs: of each row the digests of its ECGs; only rows of equal ones share a beginning.
        least: of each row the number of tokens that a beginning has to have, so that no ECG is cut.

    Returns:
        For each group the number of tokens that its rows begin with, and the rows; each row is in one group, and at least one token of
        each is left. Empty where too little would be saved.
    """
    order = sorted(range(len(prompts)), key=lambda row: (ecgs[row], prompts[row]))  # neighbours have most in common
    groups: list[tuple[int, list[int]]] = []
    for row in order:
        own = len(prompts[row]) - 1
        if groups:
            length, rows = groups[-1]
            shared = min(_num_equal(prompts[rows[0]], prompts[row]), length, own)
            together = [*rows, row]
            # half: rows that have the system prompt alone in common are about different records
            alike = ecgs[row] == ecgs[rows[0]] and 2 * shared >= min(length, own)
            if alike and shared >= max(least[member] for member in together):
                groups[-1] = (shared, together)
                continue
        groups.append((own, [row]))
    saved = sum(length * (len(rows) - 1) for length, rows in groups)
    return groups if saved >= LEAST_SAVED * sum(map(len, prompts)) else []


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def padded_width(lengths: Sequence[Sequence[int]]) -> int:
    """The most tokens that rows take, with padding, where they are read turn by turn, and before that what several of them begin with.

    Args:
        lengths: for each row the number of tokens of each of its prompts, of which each begins with the one before it.
    """
    steps = zip_longest(
        *([after - before for before, after in pairwise([0, *of_row])] for of_row in lengths), fillvalue=0
    )
    return max(of_row[0] for of_row in lengths) + sum(map(max, steps))


def tokens_of(prompt: str, text: str, offsets: list[tuple[int, int]]) -> int | None:
    """How many of the tokens of a text are those of a prompt that it begins with; None if it does not, or a token stands across
    its end."""
    if not text.startswith(prompt):
        return None
    ends = [end for _, end in offsets]
    # some tokenizers give (0, 0) for added tokens, so the ends are made to increase
    number = int(np.searchsorted(np.maximum.accumulate(ends), len(prompt), side="right"))
    aligned = ends[number - 1] == len(prompt) and (number == len(offsets) or offsets[number][0] >= len(prompt))
    return number if aligned else None
