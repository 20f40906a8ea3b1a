"""ECG-Reasoning-Benchmark: diagnoses reasoned step by step, by questions with options (Oh et al. 2026, arXiv:2603.14326).

A sample asks for a diagnosis, then reasons in loops of up to four steps: criterion selection, finding identification, ECG grounding (one
or several questions, or none) and diagnostic decision. The protocol is that of the README of
https://github.com/Jwoo5/ecg-reasoning-benchmark, release 0.0.2, "Curating Responses From Models for Evaluation": each question of the chain is
asked after the right answers to those before it, whatever the model said; the first question is asked alone, and left out of the prompts of
the chain ("Adding New Models", 6). A model that is right up to a question is then asked exactly what its own chain would have asked, so that one
run gives the scores of both. Table 1 of the paper has IDA, Completion, Depth and GT-RDA. By `ecg_reasoning_benchmark/evaluators/evaluator.py` there:

    initial_diagnosis: accuracy of the first question (IDA).
    completion: share of the samples whose whole chain is right; the chain ends at the first wrong answer (Completion, hard).
    completion_soft: the same, but a wrong decision counts as right where further findings were still required.
    depth: mean number of steps that are right before the first wrong one in a loop, from 0 to 4, over the loops that have a grounding
        step, whose questions share one point.
    gold_history_diagnosis: accuracy of the last decision after the right reasoning (GT-RDA).
    STEP_with_gold_history: accuracy of each kind of step (`_w_gt` there).

The numbers of the paper's sections could not be looked up, as its beginning alone was to be had. The authors judge texts by string matching or
by a language model ("Evaluating the Model Performance"); here a text is right if it is the right option but for case, white space, emphasis and punctuation at its ends, yes and
no also where it begins or ends with them, and a list of leads if it names the right ones. The prompt's wording is ours, as the authors'
differs by model.

Texts: the Hub's `Jwoo5/ECG-Reasoning-Benchmark`, its files `ptbxl.jsonl` and `mimic_iv_ecg.jsonl`, or a folder of these.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elm_ecg.training.data.schema import as_list
from elm_ecg.training.evaluation.benchmarks.chats import Chat, SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces
from elm_ecg.training.evaluation.benchmarks.suite import Suite
from elm_ecg.training.evaluation.scale import MetricScale

INITIAL, DECISION, LEADS = "initial_diagnostic_question", "diagnostic_decision", "lead_grounding"
GROUNDING = ("lead_grounding", "wave_grounding", "measurement_grounding")
STEPS = ("criterion_selection", "finding_identification", *GROUNDING, DECISION)
FURTHER = "further findings are required to confirm the diagnosis"
_LEAD = re.compile(r"(?<!\w)(iii|ii|i|avr|avl|avf|v[1-6])(?!\w)")
_ENDS = " \t\n*\"'`.:;,-"  # emphasis and punctuation round an answer; brackets belong to ranges
_STEP_TITLES = {step: f"{step.replace('_', ' ')}, gold history" for step in STEPS}


class ECGReasoning(Suite):
    """ECG-Reasoning-Benchmark on PTB-XL or MIMIC-IV-ECG."""

    name, title = "ecg-reasoning", "ECG-Reasoning-Benchmark"
    paper = "https://arxiv.org/abs/2603.14326"
    hub = "Jwoo5/ECG-Reasoning-Benchmark"
    max_new_tokens = 48  # the longest option has about 40
    main_metric = "initial_diagnosis"
    scales = {
        "initial_diagnosis": MetricScale(title="initial diagnosis accuracy"),
        "completion": MetricScale(title="completion"),
        "completion_soft": MetricScale(title="completion, soft"),
        "depth": MetricScale(title="depth", unit="", high=4.0, decimals=2),
        "gold_history_diagnosis": MetricScale(title="diagnosis accuracy, gold history"),
        **{f"{step}_with_gold_history": MetricScale(title=title) for step, title in _STEP_TITLES.items()},
    }

    def chats(self, place: Path | None, records: RecordPlaces, options: SuiteOptions) -> Iterator[Chat]:
        """Two chats for each sample: its first question, and its chain; see `Suite.chats`."""
        assert place is not None
        for where, sample in _samples(place):
            try:
                record = (str(sample["metadata"]["ecg_id"]),)
                first = sample["data"][INITIAL]
                yield Chat(record, (_turn({**first, "question_type": INITIAL}),))
                yield Chat(record, tuple(_chain(sample["data"]["reasoning"])))
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{where} is no sample of ECG-Reasoning-Benchmark: it lacks {error}.") from error

    def points(self, turns: Sequence[Turn], chats: Sequence[int], answers: Sequence[str]) -> dict[str, np.ndarray]:
        """The scores of the module's docstring. Those of a loop or chain are at its last question."""
        right = np.array([is_right(turn, answer) for turn, answer in zip(turns, answers, strict=True)], dtype=float)
        points = {name: np.zeros((len(turns), 2)) for name in self.scales}
        for place, turn in enumerate(turns):
            name = "initial_diagnosis" if turn.question_type == INITIAL else f"{turn.question_type}_with_gold_history"
            points[name][place] = right[place], 1
        for chain in _groups(chats):
            if turns[chain[0]].question_type == INITIAL:
                continue
            last = chain[-1]
            # a wrong decision before the last one
            excused = [turns[place].facts["further"] for place in chain]
            points["completion"][last] = right[chain].all(), 1
            points["completion_soft"][last] = (right[chain] + excused > 0).all(), 1
            points["gold_history_diagnosis"][last] = right[last], 1
            for loop in _groups([turns[place].facts["loop"] for place in chain]):
                places = [chain[index] for index in loop]
                if any(turns[place].question_type in GROUNDING for place in places):
                    points["depth"][places[-1]] = depth_of(turns, right, places), 1
        return {name: rows for name, rows in points.items() if rows[:, 1].any()}


def depth_of(turns: Sequence[Turn], right: np.ndarray, places: Sequence[int]) -> float:
    """The steps of a loop that are right before its first wrong answer; a grounding question counts for its share of that step."""
    number = sum(turns[place].question_type in GROUNDING for place in places)
    depth = 0.0
    for place in places:
        if not right[place]:
            break
        depth += 1 / number if turns[place].question_type in GROUNDING else 1
    return depth


def _groups(numbers: Sequence[int]) -> Iterator[list[int]]:
    """The places of each number, in the order of the first ones."""
    groups: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        groups.setdefault(number, []).append(place)
    yield from groups.values()


def is_right(turn: Turn, answer: str) -> bool:
    """Whether a text is the right option, as the module's docstring says."""
    said = answer.strip(_ENDS).lower()
    if turn.question_type == LEADS:
        return set(_LEAD.findall(answer.lower())) == set(_LEAD.findall(turn.answer.lower()))
    right = turn.answer.strip(_ENDS).lower()
    if right in ("yes", "no"):
        words = re.findall(r"\w+", said)
        said = next((word for word in (*words[:1], *words[-1:]) if word in ("yes", "no")), said)
    return said == right


def _samples(place: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    files = sorted(place.rglob("*.jsonl")) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"--suite ecg-reasoning={place} holds no .jsonl file; give the folder that holds ptbxl.jsonl.")
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    sample = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"Line {number} of {file} is not JSON: {error}") from error
                yield f"Line {number} of {file}", sample


def _chain(loops: Sequence[Mapping[str, Any]]) -> Iterator[Turn]:
    for number, loop in enumerate(loops):
        for step in loop.values():
            for question in as_list(step):
                yield _turn(question, loop=number)


def _turn(question: Mapping[str, Any], **facts: Any) -> Turn:
    answer = ", ".join(map(str, as_list(question["answer"])))
    kind = question["question_type"]
    if kind not in (INITIAL, *STEPS):
        raise ValueError(f"A question has the type {kind!r}; expected one of {', '.join((INITIAL, *STEPS))}.")
    several = kind == LEADS
    options = tuple(map(str, question["options"]))
    listed = "\n".join(f"- {option}" for option in options)
    how = "all options that apply, separated by commas" if several else "one of the options"
    asked = f"{question['question']}\nOptions:\n{listed}\nAnswer with the text of {how}, and nothing else."
    further = kind == DECISION and answer.lower() == FURTHER
    return Turn(asked, answer, kind, options, {"further": further, **facts})
