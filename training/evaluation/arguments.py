"""The options of `elm evaluate`, and what `evaluate` takes, checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset
from transformers import GenerationConfig
from transformers.generation.configuration_utils import BaseWatermarkingConfig

from elm_ecg.training.arguments import DataArguments, argument, json_fields
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.evaluation.conditions import ASKED, CONDITIONS
from elm_ecg.training.evaluation.scores import METRIC_NAMES, is_path, name_of
from elm_ecg.training.parser import ELMParser

ScoredBy = Literal["generation", "likelihood"]
METRICS = ("normalized_match", "token_f1", "closed_set")  # by default, beside exact_match
# fields of a generation config that would give other than one text to a prompt, or have an option of their own; and the
# cache, from which answers go on
NOT_GENERATION = (
    "max_new_tokens",
    "max_length",
    "num_return_sequences",
    "return_dict_in_generate",
    "cache_implementation",
    "use_cache",
)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are(values: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(values, list | tuple) and all(map(is_one, values))


Kind = tuple[str, Callable[[Any], bool]]  # in words, and whether a value is of it
_NUMBER: Kind = ("a number, true or false", lambda value: isinstance(value, Real))
_WHOLE: Kind = ("a whole number", _is_whole)
_TOKEN: Kind = ("the number of a token", _is_whole)
_TOKENS: Kind = ("a list of the numbers of tokens", lambda value: _are(value, _is_whole))
_ENDS: Kind = ("the number of a token, or a list of them", lambda value: _is_whole(value) or _are(value, _is_whole))
_TEXTS: Kind = (
    "a text, or a list of texts",
    lambda value: isinstance(value, str) or _are(value, lambda one: isinstance(one, str)),
)
_ANY: Kind = ("anything", lambda value: True)  # transformers says itself what is wrong, or leaves it alone
# field of a generation config -> what it takes; the others take a number, true or false
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("num_beams", "top_k", "min_length", "min_new_tokens", "no_repeat_ngram_size"), _WHOLE),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "prefill_chunk_size", "prompt_lookup_num_tokens"), _WHOLE),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"), _TOKEN),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), _ENDS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _TOKENS),
    "stop_strings": _TEXTS,
    "early_stopping": ('true, false or "never"', lambda value: isinstance(value, bool) or value == "never"),
    "exponential_decay_length_penalty": (
        "a list of two numbers",
        lambda value: _are(value, _NUMBER[1]) and len(value) == 2,
    ),
    "sequence_bias": (
        "a list of lists",
        lambda value: isinstance(value, Mapping) or _are(value, lambda one: isinstance(one, list)),
    ),
    "watermarking_config": ("names and values", lambda value: isinstance(value, Mapping | BaseWatermarkingConfig)),
    **dict.fromkeys(
        ("bad_words_ids", "compile_config", "cache_config", "num_assistant_tokens_schedule", "speculation_type"), _ANY
    ),
}

# options about data that are of training alone, and why
OF_TRAINING = {
    "perturb": "evaluation changes the ECGs itself, as --conditions says",
    "data_weights": "all rows are scored, each once",
}


@dataclass
class EvaluationArguments(DataArguments):
    """What is scored, and how."""

    model_name_or_path: str = argument(
        "",
        "Saved ELM or LoRA adapter: local folder or Hub id; also the first argument. {fold} in it stands for the fold.",
    )
    model_revision: str = argument("main", "Branch, tag or commit of a model on the Hub.")
    trust_remote_code: bool = argument(
        False, "Run the code of an encoder or connector that comes with the model. Read it before."
    )
    split: str = argument("test", "Split of the data that is scored.")
    fold: list[int] | None = argument(  # type: ignore[assignment]  # one of them, or several
        None, "Folds of datasets that have splits such as fold1_train and fold1_test; each is a run."
    )
    output_dir: str | None = argument(
        None,
        "Folder of the results. Default: one of this data and these settings in MODEL/evaluation, or ./evaluation.",
    )
    score: ScoredBy = argument(
        "generation",
        "generation: what the model writes. likelihood: which of the candidate answers it finds likeliest, with the "
        "AUROC of their shares.",
    )
    candidates: list[str] | None = argument(
        None,
        "Answers that --score likelihood decides among. Default: those that a type of question has in the training "
        "and in the scored split.",
    )
    conditions: list[str] = argument(
        list(ASKED),
        f"What is shown of the ECG ({'; '.join(f'{name}, {CONDITIONS[name].description}' for name in ASKED)}). "
        "ecg is always among them.",
        choices=list(ASKED),
    )
    batch_size: int = argument(32, "Conversations answered at once.")
    max_new_tokens: int = argument(128, "Longest answer, in tokens.")
    generation_kwargs: str | None = argument(
        None, 'JSON with other options of `generate`, such as {"num_beams": 4}. Default: greedy decoding.'
    )
    dtype: str = argument("auto", "Data type of the model: auto, float32, bfloat16 or float16.")
    torch_compile: bool = argument(False, "Compile the model with torch.compile.")
    dataset_num_proc: int | None = argument(None, "Processes that prepare datasets of the reference.")
    seed: list[int] = argument(
        [0], "Random seed of noise, swapped ECGs, sampled answers and the bootstrap; each of several is a run."
    )
    num_resamples: int = argument(2000, "Bootstrap resamples of patients.")
    metrics: list[str] = argument(
        list(METRICS),
        f"Scores beside exact match: {', '.join(METRIC_NAMES)}, or the path of a metric of your own, ./NAME.py; bleu4, rouge_l, meteor "
        "and bert_score need the extra `metrics`.",
    )
    main_metric: str | None = argument(
        None, "Metric of the verdict and the plots. Default: auroc where there is one, else exact_match."
    )
    explain_examples: bool = argument(
        False, "Shade the examples of the report where the answers with the ECG rest on it, as `elm explain` does."
    )
    bert_score_model: str | None = argument(None, "Encoder of bert_score that it knows, such as roberta-large.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.generation = json_fields("generation_kwargs", self.generation_kwargs)
        check_settings(vars(self), "--")
        for name in ("seed", "fold"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(map(str, values))} names one twice.")
        if "{fold}" in self.model_name_or_path and self.fold is None:
            raise ValueError(
                f"--model_name_or_path is {self.model_name_or_path}; say which --fold stands for {{fold}}."
            )

    @property
    def samples(self) -> bool:
        """Whether answers are drawn at random."""
        return bool(self.generation.get("do_sample", False))

    def load(self, fold: int | None, split: str, **changes: Any) -> Dataset | None:
        """A split of the data, of one `fold` if it has folds; None if it has no such split."""
        values = {option.name: getattr(self, option.name) for option in fields(DataArguments)}
        arguments = DataArguments(**values | {"fold": fold} | changes)  # one fold, where `self.fold` may list several
        return load_data(arguments, split, self.seed[0], self.dataset_num_proc)  # one subset for all seeds


def parse(argv: list[str] | None = None) -> EvaluationArguments:
    """The arguments of `elm evaluate`.

    Raises:
        ValueError: no model is named, or an option is not as expected.
    """
    parser = ELMParser(EvaluationArguments, prog="elm evaluate")
    parser.refuse(OF_TRAINING)
    (args,) = parser.parse_args_and_config(argv)
    if not args.model_name_or_path:
        raise ValueError("Which model? Give its folder or Hub id as --model_name_or_path.")
    return args


def check_settings(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Refuses settings before anything is asked.

    Args:
        settings: arguments of `evaluate`, or options of the command, named with the `prefix`.

    Raises:
        ValueError: one is not as expected, or does not go with another.
    """
    for name in ("batch_size", "max_new_tokens", "num_resamples"):
        if settings[name] < 1:
            raise ValueError(f"{prefix}{name} is {settings[name]}; it must be at least 1.")
    if min(np.atleast_1d(settings["seed"])) < 0:
        raise ValueError(f"{prefix}seed is {settings['seed']}; it must be at least 0.")
    own = [name_of(metric) for metric in settings["metrics"] if is_path(metric)]
    scored = ["exact_match", *map(name_of, settings["metrics"]), *["auroc"] * (settings["score"] == "likelihood")]
    if len(set(own)) < len(own):
        raise ValueError(f"{prefix}metrics has two of one name: {', '.join(own)}.")
    if settings["main_metric"] not in (None, *scored):
        raise ValueError(
            f"{prefix}main_metric is {settings['main_metric']}, which is not scored; expected one of {', '.join(dict.fromkeys(scored))}. "
            f"Others are named with {prefix}metrics, and auroc needs {prefix}score likelihood."
        )
    known = {"conditions": ASKED, "metrics": (*METRIC_NAMES, "the path of a metric"), "score": get_args(ScoredBy)}
    for name, expected in known.items():
        values = [settings[name]] if name == "score" else settings[name]
        unknown = [value for value in values if value not in expected and not (name == "metrics" and is_path(value))]
        if unknown:
            raise ValueError(f"{prefix}{name} has {', '.join(unknown)}; expected some of {', '.join(expected)}.")
    if "bert_score" in settings["metrics"] and settings["bert_score_model"] is None:
        raise ValueError(
            f"{prefix}metrics bert_score compares what an encoder makes of the answers; name it with {prefix}bert_score_model."
        )
    if settings["candidates"] and settings["score"] != "likelihood":
        raise ValueError(
            f"{prefix}candidates are what {prefix}score likelihood decides among; add that, or leave them out."
        )
    check_generation(settings["generation"], settings["max_new_tokens"], prefix)
    if settings["generation"] and settings["score"] == "likelihood":
        name = "--generation_kwargs" if prefix else "generation"
        raise ValueError(f"{name} with {prefix}score likelihood, which generates nothing; leave them out.")


def check_generation(generation: Mapping[str, Any], max_new_tokens: int, prefix: str = "") -> None:
    """Refuses (ValueError) what are no options of `generate`, or such as give other than one text to a question or let none end."""
    name = "--generation_kwargs" if prefix else "generation"
    unknown = [key for key in generation if key in NOT_GENERATION or key not in vars(GenerationConfig())]
    if unknown:
        raise ValueError(
            f"{name} has {', '.join(unknown)}; expected options of `generate` that leave one text to a question, and "
            f"{prefix}max_new_tokens apart."
        )
    check_kinds(name, generation)
    check_shortest(name, generation, f"{prefix}max_new_tokens", max_new_tokens)


def check_shortest(name: str, generation: Mapping[str, Any], of_longest: str, longest: int | None) -> None:
    """Refuses (ValueError) a shortest answer above the longest one: transformers then cuts every answer off before it may end.

    Args:
        name, of_longest: of the option with `min_new_tokens`, and of that with the longest answer, None where there is none.
    """
    shortest = generation.get("min_new_tokens") or 0
    if longest is not None and shortest > longest:
        raise ValueError(
            f"{name} min_new_tokens is {shortest}, above {of_longest} {longest}: no answer could end. Lower the one or raise the other."
        )


def check_kinds(name: str, generation: Mapping[str, Any]) -> None:
    """Refuses (ValueError) fields of a generation config whose values are of another kind, at which `generate` would stumble later.

    Args:
        name: of the option that they are from.
    """
    for key, value in generation.items():
        expected, is_right = KINDS.get(key, _NUMBER)
        if value is not None and not is_right(value):
            raise ValueError(f"{name} {key} is {value!r}; expected {expected}.")
