"""What the prompts of several rows begin with, such as a record that many questions are about: it is read once for all of them."""

from collections.abc import Sequence

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
