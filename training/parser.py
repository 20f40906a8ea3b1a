"""The parser of the commands that train and evaluate: options of dataclasses, recipes by name, the reference's spellings."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

from trl import TrlParser

from elm_ecg.training.arguments import check_numbers, json_fields
from elm_ecg.training.command_line import CommandLineParser, did_you_mean
from elm_ecg.training.files import resource
from elm_ecg.training.trl_options import RENAMED

# what users of the reference type -> the option it stands for
ALIASES = {
    "data_representation": "representation",
    "elm_ckpt": "model_name_or_path",
    "encoder_ckpt": "encoder_name_or_path",
    "num_encoder_tokens": "num_ecg_tokens",
    "segment_len": "num_samples",
    "leads": "lead_names",
    "peft": "use_peft",
    "batch_size": "per_device_train_batch_size",  # of each process, not of all together
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "optimizer": "optim",
    "llm_input_len": "max_length",
}
# options of TRL that most runs say: `elm sft --help` shows these, and the others with `--help-all`
COMMON = {*ALIASES.values(), "output_dir", "seed", "max_steps", "gradient_accumulation_steps", "eval_strategy"}
COMMON |= {
    "loss_type",
    "num_generations",
    "temperature",
    "top_p",
    "max_completion_length",
    "num_iterations",
    "reward_weights",
    "beta",
}
COMMON |= {"logging_steps", "save_strategy", "resume_from_checkpoint", "report_to", "lora_r", "attn_implementation"}
# options of transformers that are JSON on the command line; one that does not begin with a brace is a file, or refused with its values
JSON_OPTIONS = ["accelerator_config", "activation_checkpointing_kwargs", "deepspeed", "fsdp_config"]
JSON_OPTIONS += ["gradient_checkpointing_kwargs", "lr_scheduler_kwargs"]
# options of TRL and transformers -> what their numbers have to be: with others nothing is trained, or something else, without a word
NUMBERS = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_r"),
        "at least 1",
    ),
    **dict.fromkeys(("num_train_epochs", "lora_alpha"), "above 0"),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers"), "at least 0"),
    "max_steps": "at least 1, or -1 for none",
    "lora_dropout": "at least 0 and below 1",
}
# names of the types of options -> what a YAML file may give for them, and what it is called
NUMBER_TYPES: dict[str | None, tuple[type, str]] = {"int": (Integral, "a whole number"), "float": (Real, "a number")}
# values of the reference's --optimizer
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch"}  # transformers has no plain Adam; alike at weight_decay 0


def recipes(prog: str = "elm sft") -> dict[str, Path]:
    """The recipes of a command that come with the package, by name: those that begin as it is named, of `elm sft` all others."""
    paths = sorted(resource("training/configs").glob("*.yaml"))
    of_others = ("pretrain", "rl", "dpo")
    command = prog.rpartition(" ")[2]
    own = (command,) if command in of_others else of_others
    return {path.stem: path for path in paths if (path.stem.partition("_")[0] in own) == (command in of_others)}


def find_recipe(name: str, prog: str = "elm sft") -> Path:
    """The file that `--config` names: any YAML file by its path, or a recipe of the command by its name."""
    known = recipes(prog)
    path = Path(name) if Path(name).is_file() else known.get(name)  # a file here wins over a recipe
    if path is None:
        near = did_you_mean(Path(name).stem, known)
        raise ValueError(f"--config {name} is no file and no recipe.{near} Recipes: {', '.join(known)}.")
    return path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows an option in its spellings with underscores, and its default where the help does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = "efault" in (action.help or "") or action.default is False or action.default in (None, "", [])  # D, d
        return action.help if told else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]  # HfArgumentParser adds --a-b to --a_b
        if not names or action.nargs == 0:  # flags that take no value, such as --help
            return super()._format_action_invocation(action)
        value = action.dest.upper()
        return (
            f"{', '.join(names)} {value if len(list(action.choices or ())) > 10 else self._format_args(action, value)}"
        )


class HelpAllAction(argparse._HelpAction):
    """`--help-all`: the help with all options of other libraries."""

    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        parser._action_groups += parser.foreign_groups  # argparse writes the help from this list
        super().__call__(parser, *args, **kwargs)


class ELMParser(CommandLineParser, TrlParser):
    """TRL's parser of dataclasses and `--config FILE.yaml`. This one takes recipes by name and the reference's spellings, sorts
    the options into groups, and hides most of those of other libraries until `--help-all`."""

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        self.groups: dict[str, Any] = {}
        self.foreign_groups: list[Any] = []
        # of `refuse`
        self.refused: dict[str, str] = {}
        self.refused_values: dict[str, dict[str, str]] = {}
        self.needed: dict[str, str] = {}
        self.presets: dict[str, Any] = {}
        self.source = ""  # of the values that are not the command line's, for errors
        epilog = f"--config FILE.yaml or NAME reads options from a file, or from a recipe of this package: {', '.join(recipes(kwargs.get('prog', '')))}."
        kwargs = {
            "usage": "%(prog)s [options]; --help lists them",
            "formatter_class": HelpFormatter,
            "epilog": epilog,
        } | kwargs
        super().__init__(dataclass_types, **kwargs)
        if self.foreign_groups:
            self.add_argument("--help-all", action=HelpAllAction, help="show all options, TRL's too, and exit")
        for alias, name in ALIASES.items():
            action = self._option_string_actions.get(f"--{name}")  # None where the command has no such option
            if action is not None:
                self._option_string_actions[f"--{alias}"] = action  # argparse cannot add a name to an option
                action.option_strings = [*action.option_strings, f"--{alias}"]
                if alias == "optimizer":
                    action.type = lambda name: OPTIMIZERS.get(name, name)  # argparse applies it before `choices`

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """Each option goes into the group of the class that declares it first: EvaluationArguments inherits `--data`."""
        types = get_type_hints(dtype)  # HfArgumentParser refuses types that are strings
        for option in fields(dtype):
            if not option.init:
                continue
            owner = next(part for part in dtype.__mro__[::-1] if option.name in getattr(part, "__annotations__", ()))
            foreign = not owner.__module__.startswith("elm_ecg.")
            title = vars(owner).get("_argument_group_name", "this command")
            if foreign:
                first = next(part for part in dtype.__mro__ if not part.__module__.startswith("elm_ecg."))
                title = f"{first.__name__} of {'TRL' if first.__module__.startswith('trl.') else 'transformers'}"
            if foreign and option.name in COMMON:
                title = "training"
            if title not in self.groups:
                self.groups[title] = self.add_argument_group(title)
                if foreign:  # what is not in this list is parsed, but not shown
                    self._action_groups.remove(self.groups[title])
                    self.foreign_groups.append(self.groups[title])
            option.type = types[option.name]
            self._parse_dataclass_field(self.groups[title], option)
            if types[option.name] == bool | None:  # alone it is a yes, as those whose default is not None
                action = self._option_string_actions[f"--{option.name}"]
                action.nargs, action.const = "?", True

    def refuse(
        self,
        reasons: dict[str, str],
        values: dict[str, dict[str, str]] | None = None,
        needed: dict[str, str] | None = None,
    ) -> None:
        """Takes no value of some options but the present default, and shows them in no help.

        Args:
            reasons: option -> why, and what to use instead.
            values: option -> value -> why this value alone is refused.
            needed: option -> the other, without which it may not be said either.
        """
        self.refused_values, self.needed = values or {}, needed or {}
        for action in self._actions:
            self.presets.setdefault(action.dest, action.default)  # --no_x, which follows --x, has another default
            if action.dest in reasons:
                action.help = argparse.SUPPRESS
                action.type = str if action.default is None else action.type  # not "invalid dict value", but why
                self.refused[action.dest] = reasons[action.dest]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As `CommandLineParser`'s; a value that `refuse` was told of is a ValueError, wherever it comes from, as are broken JSON and
        numbers with which nothing is trained."""
        namespace, unknown = super().parse_known_args(args, namespace)
        said = {name for name, preset in self.presets.items() if getattr(namespace, name, preset) != preset}
        for name, reason in self.refused.items():
            if name in said:  # the value is not shown: it may be a token
                raise ValueError(f"--{name} cannot be used: {reason}.")
        for name, reasons in self.refused_values.items():
            if (value := getattr(namespace, name)) in reasons:
                raise ValueError(f"--{name} {value} cannot be used: {reasons[value]}.")
        for name, other in self.needed.items():
            if name in said and other not in said:
                raise ValueError(f"--{name} changes nothing without --{other}; add that, or leave --{name} out.")
        check_numbers(namespace, NUMBERS)
        for name in JSON_OPTIONS:
            value = getattr(namespace, name, None)
            if isinstance(value, str) and value.startswith("{"):
                json_fields(name, value)  # transformers would not say of which option its error is
        return namespace, unknown

    def parse_args_into_dataclasses(  # type: ignore[override]
        self, args: Any = None, return_remaining_strings: bool = False
    ) -> Any:
        """As transformers', but without the options of a file that is named as the program, such as elm.args."""
        return super().parse_args_into_dataclasses(args, return_remaining_strings, look_for_args_file=False)

    def _check_spellings(self, names: Iterable[str]) -> None:
        """Refuses two names of one option (ValueError), such as `--lr` beside `--learning_rate`: which of them counts?"""
        spellings: dict[str, str] = {}
        for name in names:
            option = f"--{name}"  # or the beginning of one that no other has
            found = {
                self._option_string_actions[text] for text in self._option_string_actions if text.startswith(option)
            }
            action = self._option_string_actions.get(option) or (found.pop() if len(found) == 1 else None)
            if action is not None:
                other = spellings.setdefault(RENAMED.get(action.dest, action.dest), name)
                if other.replace("-", "_") != name.replace("-", "_"):
                    raise ValueError(f"{self.source}--{other} and --{name} are one option; leave one of them out.")

    def parse_args_and_config(self, args: Iterable[str] | None = None, *flags: Any, **kwargs: Any) -> Any:
        """As TRL's; `--config` takes the name of a recipe too."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            words += word.split("=", 1) if word.startswith("--config=") else [word]  # TRL knows it as two words alone
        self._check_spellings(word[2:].partition("=")[0] for word in words if word.startswith("--"))
        if words[-1:] == ["--config"]:
            self.error("--config needs a YAML file, or the name of a recipe")
        if words.count("--config") > 1:
            self.error(
                "--config takes one YAML file or recipe; put the options of the others into it, or on the command line"
            )
        if "--config" in words:
            place = words.index("--config") + 1
            self.source = f"--config {words[place]}: "
            words[place] = str(find_recipe(words[place], self.prog))
        return super().parse_args_and_config(words, *flags, **kwargs)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Takes the values of a YAML file or of Python; argparse itself checks only those of the command line."""
        values: dict[str, Any] = {}
        self._check_spellings(config)
        for key, value in config.items():
            action = self._option_string_actions.get(f"--{key}")  # aliases too, while TRL knows names of fields alone
            if action is None:
                near = did_you_mean(key, [name[2:] for name in self._option_string_actions if "-" not in name[2:]])
                raise ValueError(f"{self.source}there is no option {key}.{near}")
            if action.nargs == "+" and value is not None:  # YAML may give one item without brackets
                value = list(value) if isinstance(value, list | tuple) else [value]
            for item in value if isinstance(value, list) else [value]:
                name = OPTIMIZERS.get(item, item) if action.dest == "optim" else item
                if action.choices is not None and name is not None and name not in action.choices:
                    expected = ", ".join(map(str, action.choices))
                    near = did_you_mean(str(name), map(str, action.choices))
                    raise ValueError(f"{self.source}{key} is {item!r}; expected one of {expected}.{near}")
            # by name, as transformers wraps the type of an option that may be none
            if getattr(action.type, "__name__", None) in NUMBER_TYPES and value is not None:
                of_list = action.nargs == "+"
                value = [self._number(key, action.type, item) for item in (value if of_list else [value])]
                value = value if of_list else value[0]
            values[action.dest] = value
        return super().set_defaults_with_config(**values)

    def _number(self, key: str, convert: Any, value: Any) -> Any:
        """A number of a YAML file or of Python, also as text, which YAML makes of 1e-4 (ValueError: it is not of the kind that `convert`
        makes of a text)."""
        kind, expected = NUMBER_TYPES[convert.__name__]
        try:
            number = convert(value) if isinstance(value, str) else value
        except ValueError:
            number = value
        if isinstance(value, str) and number is None:  # none, where an option may be so
            return None
        if kind is Integral and isinstance(number, float) and number.is_integer():
            number = int(number)  # as extractors have their sampling rate
        if isinstance(number, bool) or not isinstance(number, kind):
            raise ValueError(f"{self.source}{key} is {value!r}; expected {expected}.")
        return number
