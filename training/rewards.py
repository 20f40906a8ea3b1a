"""What `elm rl` rewards an answer for.

A reward function is one of TRL's: it gets `prompts`, `completions` and each column of the rows by keyword, and returns a number for
each completion, or None where it has nothing to say. The column `solution` is the right answer.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trl.rewards import get_soft_overlong_punishment

from elm_ecg.own_code import load_own_class
from elm_ecg.training.evaluation.scores import METRIC_NAMES, load_metrics
from elm_ecg.training.evaluation.thinking import TAGS, scored_answer

FORMAT = re.compile(r"<think>.*?</think>.*?<answer>.*?</answer>", re.DOTALL)
OVERLONG = 0.2  # share of --max_completion_length at its end in which an answer loses by its length (DAPO)
NEED_MORE = ("bert_score", "closed_set")  # metrics that score with a model, or all answers of a type together
# the rewards of our own -> what they are, for --help
REWARDS = {
    "format": "1 if the whole answer is <think>...</think>, anything, <answer>...</answer>, else 0",
    "tags": "share of the four tags that stand exactly once; of three where <think> is given",
    "answer": "half the F1 of the statements within <answer>, parted by semicolons, half 1 if they are the right text",
    "length": "0, and less and less down to -1 in the last fifth of --max_completion_length (DAPO)",
}


@dataclass
class Reward:
    """A reward by its name.

    Args:
        function: as TRL calls it.
        context: what it gets by keyword too: `think_given`, whether answers begin with a given `<think>`, and
            `max_completion_length`, in tokens.
    """

    name: str
    function: Callable[..., Sequence[float | None]]
    context: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.__name__ = self.name  # TRL logs by it

    def __call__(self, **kwargs: Any) -> list[float | None]:
        """The rewards of the completions.

        Raises:
            ValueError: the function fails, or gives another number of values, or one that is no finite number.
        """
        number = len(kwargs["completions"])
        try:
            values = list(self.function(**kwargs, **self.context))
        except Exception as error:  # whatever it does
            raise ValueError(f"The reward {self.name} fails: {type(error).__name__}: {error}") from error
        if len(values) != number:
            raise ValueError(
                f"The reward {self.name} gives {len(values)} values for {number} answers; expected one for each."
            )
        for place, value in enumerate(values):
            if value is None:
                continue
            told = f"The reward {self.name} gives {value!r} for the answer {_text(kwargs['completions'][place])!r:.200}; expected a"
            try:
                values[place] = number_of = float(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{told} number, or None where it has nothing to say.") from error
            if not math.isfinite(number_of):
                raise ValueError(f"{told} finite number, or None where it has nothing to say.")
        return values


def _text(completion: Any) -> str:
    """The text of a completion, which TRL gives as a chat of one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 where the whole answer is `<think>...</think>`, anything, `<answer>...</answer>`, but for white space at either end."""
    return [float(FORMAT.fullmatch(_text(completion).strip()) is not None) for completion in completions]


def tags_reward(completions: list[Any], think_given: bool = False, **kwargs: Any) -> list[float]:
    """The share of the four tags that stand exactly once; of the three others where `<think>` is given."""
    tags = TAGS[1:] if think_given else TAGS
    return [sum(_text(completion).count(tag) == 1 for tag in tags) / len(tags) for completion in completions]


def answer_reward(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """Half the F1 of the statements of the answer, parted by semicolons and compared in lower case, half 1 if it is the right text but
    for white space at either end. 0 without `<answer>...</answer>` where the right answer has them, and of one that is still thinking."""
    rewards = []
    for answer, right in _answers(completions, solution):
        given, expected = _statements(answer), _statements(right)
        f1 = 2 * len(given & expected) / (len(given) + len(expected)) if given and expected else 0.0
        rewards.append(0.5 * f1 + 0.5 * (answer == right))
    return rewards


def length_reward(
    completions: list[Any], completion_ids: list[Any], max_completion_length: int, **kwargs: Any
) -> list[float]:
    """0 for answers that are short enough, and less and less down to -1 in the last fifth of `max_completion_length` tokens."""
    longest = max(2, max_completion_length)
    punish = get_soft_overlong_punishment(longest, max(1, round(OVERLONG * longest)))
    return punish(completion_ids=completion_ids)


def _answers(completions: Sequence[Any], solution: Sequence[str]) -> list[tuple[str, str]]:
    """What scores of each answer and of the right one, as in `elm evaluate`."""
    pairs = zip(completions, solution, strict=True)
    return [(scored_answer(_text(completion), right), scored_answer(right, right)) for completion, right in pairs]


def _statements(answer: str) -> set[str]:
    return {part.strip() for part in answer.lower().split(";")} - {""}


def metric_reward(name: str) -> Callable[..., list[float]]:
    """A metric of `elm evaluate` as a reward: its score of each answer, of what stands within `<answer>`.

    Raises:
        ValueError: it gives no score of a single answer; as `load_metrics`.
    """
    module: Any = load_metrics([name])[name]
    if name in NEED_MORE or hasattr(module, "statistic"):
        raise ValueError(
            f"--rewards {name}: this metric gives no score of a single answer by itself; take another, such as exact_match, set_f1 or "
            "token_f1."
        )

    def reward(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
        pairs = _answers(completions, solution)
        scores = module.compute(predictions=[pair[0] for pair in pairs], references=[pair[1] for pair in pairs])
        return [float(score) for score in scores["samples"]]

    return reward


def own_reward(option: str) -> Reward:
    """The function of `FILE.py:function` (ValueError: there is none, or it does not take what TRL gives)."""
    file, _, name = option.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--rewards {option}: there is no file {file}.")
    if name in REWARDS or name in METRIC_NAMES:
        raise ValueError(f"--rewards {option}: there is a reward {name} already; give your function another name.")
    try:
        function: Any = load_own_class(f"{path.stem}.{name}", path.absolute().parent, trust_remote_code=True)
    except Exception as error:  # whatever the file does
        raise ValueError(f"--rewards {option} cannot be loaded: {type(error).__name__}: {error}") from error
    if not inspect.isroutine(function):
        raise ValueError(f"--rewards {option}: {name} is no function, but {function!r:.80}.")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"--rewards {option}: {name} is asynchronous; expected a plain function.")
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ValueError(
            f"--rewards {option}: {name} takes no **kwargs; expected def {name}(completions, solution, **kwargs), as all columns of the "
            "rows are given by keyword."
        )
    return Reward(name, lambda **kwargs: function(**kwargs))


def load_rewards(options: Sequence[str]) -> list[Reward]:
    """The rewards of `--rewards`, in their order.

    Raises:
        ValueError: one is not there, or two have one name.
    """
    own: dict[str, Callable[..., list[float]]] = {
        "format": format_reward,
        "tags": tags_reward,
        "answer": answer_reward,
        "length": length_reward,
    }
    rewards: list[Reward] = []
    for option in options:
        if option in own:
            rewards.append(Reward(option, own[option]))
        elif option in METRIC_NAMES:
            rewards.append(Reward(option, metric_reward(option)))
        elif ".py:" in option:
            rewards.append(own_reward(option))
        else:
            near = get_close_matches(option, [*own, *METRIC_NAMES], 1)
            raise ValueError(
                f"--rewards {option}: there is no such reward.{f' Did you mean {near[0]}?' if near else ''} Expected some of "
                f"{', '.join([*own, *METRIC_NAMES])}, or FILE.py:function."
            )
    names = [reward.name for reward in rewards]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--rewards names {repeated} twice; name it once, and say its weight with --reward_weights.")
    return rewards
