"""What the command lines of all verbs share; the standard library alone, as it travels into Spaces."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from elm_ecg.training.files import NO_ROOM, ending_on_sigterm, no_room

MAX_NEW_TOKENS = 128  # of an answer, in `elm predict` and `elm explain`


class CommandLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors take two lines, and name the option that was probably meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, but an unknown word is an error; a subcommand's own parser raises it, as it knows the options."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # the option before all else: what follows a wrong one is unknown too
            wrong = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            options = [name for name in self._option_string_actions if "-" not in name[2:]]  # not those with dashes
            self.error(f"there is no option {wrong}.{did_you_mean(wrong, options)}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = did_you_mean(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}.{near}") from None

    def error(self, message: str) -> NoReturn:
        """Ends the command with exit status 2 and the usage, where that is no list of all options."""
        usage = self.format_usage()
        hint = usage if usage.count("\n") == 1 else f"usage: {self.prog} [options]; --help lists them\n"
        self.exit(2, f"{self.prog}: {message}\n{hint}")


# what steers a terminal, or turns the direction of writing: files, models and datasets of others may hold it
_STEERING = dict.fromkeys(
    {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {9, 10},
    "\N{REPLACEMENT CHARACTER}",
)


def printable(text: object) -> str:
    """A text for the terminal, which it does not steer."""
    return str(text).translate(_STEERING)


def run_command(name: str, main: Callable[[], Any]) -> int:
    """Runs a command and returns the exit status: 0; 1 where the input was at fault, which takes one line on stderr; 130 after
    Ctrl-C. SIGTERM raises SystemExit (143). ELM_DEBUG=1 shows the traceback of any error; one of the program's own always has
    it, as it tells more."""
    try:
        with ending_on_sigterm():
            main()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError

        full = no_room(error)  # libraries have classes of their own for it
        of_input = full is not None or isinstance(error, ValueError | OSError | ImportError | StrictDataclassError)
        if not of_input or os.environ.get("ELM_DEBUG"):
            raise
        of_class = isinstance(error, StrictDataclassClassValidationError)  # of a model's config; its text is two lines
        told = sentence(error.__cause__ if of_class else error)
        if full is not None:
            where = getattr(error, "filename", None) or "a disk that it writes to; `df -h` shows which"
            told = f"{NO_ROOM[full]}: {where}"
        print(printable(f"{name}: {told}"), file=sys.stderr)
        return 1
    return 0


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A sentence that suggests the nearest of `words`, after a space; nothing where none is near."""
    names = {name.lstrip("-"): name for name in words}  # dashes alone make no option near
    near = difflib.get_close_matches(word.lstrip("-"), names, n=1)
    return f" Did you mean {names[near[0]]}?" if near else ""


def sentence(error: BaseException | None) -> str:
    """What an error says, for people: Python's own of a missing file is `[Errno 2] No such file or directory: 'PATH'`."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"There is no file {os.fsdecode(error.filename)}."
    return str(error)


def read_system_prompt(text: str | None) -> str | None:
    """The text of `--system_prompt`, which may name a file that holds it (ValueError: it is no text)."""
    if text is None or not os.path.isfile(text):  # False for a text that is too long for a name, where pathlib raises
        return text
    return Path(text).read_text(encoding="utf-8").strip()


def whole_number(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return value


def add_model_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The options of a command that asks a saved model: where it is from, and how it is asked; the longest answer by default."""
    add = parser.add_argument
    add("--revision", default="main", help="of a Hub id; default: %(default)s")
    code_help = "run the code of an encoder or connector that comes with the model; read it before"
    add("--trust_remote_code", action="store_true", help=code_help)
    tokens_help = f"longest answer; default: {max_new_tokens}"
    add("--max_new_tokens", type=whole_number, default=max_new_tokens, metavar="TOKENS", help=tokens_help)
    system_help = "system message, or a file that holds it; default: that of the model's training; '' for none"
    add("--system_prompt", metavar="TEXT", help=system_help)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="of the model; default: as it was saved")


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """The options that describe records whose files do not."""
    add = parser.add_argument
    add("--sampling_rate", type=float, metavar="HZ", help="where a file does not say")
    add("--unit", help="where a file does not say: mV, uV or V")
    add("--lead_names", nargs="+", metavar="LEAD", help="of the rows, where a file does not say")
