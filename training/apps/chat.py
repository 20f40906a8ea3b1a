"""`elm chat`: ask an ELM about ECGs in the terminal."""

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Generator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from elm_ecg.ecg_drawing import ECGPaper
from elm_ecg.training.apps.conversation import (
    DISCLAIMER,
    ChatECG,
    PromptCache,
    as_message,
    load_model,
    model_parser,
    read_for_model,
    stream_answer,
)
from elm_ecg.training.apps.plot import add_file_options, save_picture
from elm_ecg.training.apps.served import ServedModel, check_options, read_to_send
from elm_ecg.training.command_line import printable, read_system_prompt, sentence
from elm_ecg.training.files import write_text

try:
    import readline
except ImportError:  # not on Windows
    readline = None  # type: ignore[assignment]

HISTORY_LENGTH = 1000
HELP = """\
/ecg FILE [FILE ...]  ECGs that the next question is about; without FILE, those of the chat
    [--start SECOND]  where the part that the model reads begins, of a longer record
    [--sampling_rate HZ] [--unit UNIT] [--lead_names LEAD ...]  where the file does not say
/plot [FILE.png]      draw the ECGs of the chat as the model reads them, as PNG or SVG
/why [NAME]           draw what the last answer rests on, as NAME.png, NAME.svg and NAME.json
/save FILE.json       write the chat as a row of a dataset
/clear                begin a new chat
/help                 this list
/quit                 or Ctrl-D; Ctrl-C stops an answer
Anything else is a question."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors do not end the chat."""

    def error(self, message: str) -> Any:
        """Raises the message as a ValueError, where argparse would end the process."""
        raise ValueError(f"{self.prog}: {message}. /help lists the commands.")


def _ecg_parser() -> CommandParser:
    parser = CommandParser(prog="/ecg", add_help=False, allow_abbrev=False)  # -h would end the process
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--start", type=float)
    add_file_options(parser)
    return parser


class Chat:
    """A conversation with a loaded ELM, and its commands.

    Args:
        name: of the model, for people.
        generation: `max_new_tokens` and `temperature` of `stream_answer`.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, name: str, **generation: Any) -> None:
        self.model, self.processor, self.name, self.generation = model, processor, name, generation
        self.clear()

    def clear(self) -> None:
        """Forgets the questions, the answers and the ECGs."""
        self.messages: list[dict[str, Any]] = []
        self.ecgs: list[ChatECG] = []
        self.num_asked = 0  # of the ECGs that stand in the messages
        self.lacks_ecg = False  # that the last /ecg was to read
        self.cache = PromptCache()  # the old one does not tell other ECGs from its own

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. It is remembered as far as it came; without one, the question is not."""
        turn = as_message("user", question, self.ecgs[self.num_asked :])  # those that no question was about yet
        answer = ""
        # else the model would write on when the reader stops
        with contextlib.closing(self._answer([*self.messages, turn])) as pieces:
            try:
                for piece in pieces:
                    answer += piece
                    yield piece
            finally:
                if answer:
                    self.messages += [turn, as_message("assistant", answer.strip())]
                    self.num_asked = len(self.ecgs)

    def _answer(self, messages: list[dict[str, Any]]) -> Generator[str, None, None]:
        return stream_answer(self.model, self.processor, messages, cache=self.cache, **self.generation)

    def _read(self, path: Path, start: float | None, **described: Any) -> ChatECG:
        return read_for_model(self.processor, path, start, **described)

    def row(self) -> dict[str, Any]:
        """The chat as a row of a dataset, with the part of each ECG that the model read, as it was recorded."""
        ecgs = []
        for ecg in self.ecgs[: self.num_asked]:
            record = ecg.record
            # the shortest numbers that are these float32
            array = record.array[:, self._part(ecg)].astype(str).astype(np.float64).tolist()
            described = {"sampling_rate": record.sampling_rate, "lead_names": list(record.lead_names), "unit": "mV"}
            ecgs.append({"array": array, **described})
        prompt = self._system_prompt
        messages = [*([as_message("system", prompt)] if prompt else []), *self.messages]
        return {"ecg": ecgs, "messages": _with_places(messages), "model": self.name}

    @property
    def _system_prompt(self) -> str | None:
        return getattr(self.processor, "system_prompt", None)  # which code saved before there was one lacks

    def _part(self, ecg: ChatECG) -> slice:
        """The samples that the model read, at the rate of the record."""
        prepared, rate = ecg.prepared, ecg.record.sampling_rate
        first = round(prepared.metadata["start_second"] * rate)
        return slice(first, first + round(prepared.array.shape[1] / prepared.sampling_rate * rate))

    def command(self, line: str) -> bool:
        """Runs a line that begins with a slash, and prints what came of it. Returns whether the chat goes on.

        Raises:
            ValueError, OSError, ImportError: the command is unknown or cannot be done.
        """
        self.lacks_ecg |= line.startswith("/ecg ")  # until they are read
        try:
            verb, *arguments = shlex.split(line)  # quotes hold the blanks of a file's name, as in a shell
        except ValueError as error:
            raise ValueError(
                f'{line.split()[0]}: {error}; put a name that holds a quote into quotes of the other kind, as "O\'Neill.xml".'
            ) from error
        if verb == "/ecg":
            self._ecg(arguments)
        elif verb == "/plot":
            self._plot(_one(verb, arguments, "FILE.png") if arguments else None)
        elif verb == "/why":
            self._why(_one(verb, arguments, "NAME") if arguments else None)
        elif verb == "/save":
            self._save(_one(verb, arguments, "FILE.json"))
        elif verb in ("/clear", "/help", "/quit"):
            if arguments:
                raise ValueError(f"{verb} takes no argument, but got {' '.join(arguments)!r}.")
            if verb == "/clear":
                self.clear()
                print("A new chat, without ECG.")
            elif verb == "/help":
                print(HELP)
            return verb != "/quit"
        else:
            raise ValueError(f"There is no command {verb}. /help lists the commands.")
        return True

    def _ecg(self, arguments: list[str]) -> None:
        args = _ecg_parser().parse_args(arguments)
        described = {name: getattr(args, name) for name in ("sampling_rate", "unit", "lead_names")}
        # all or none
        ecgs = [self._read(path.expanduser(), args.start, **described) for path in args.files]
        self.ecgs += ecgs
        self.lacks_ecg = False
        for ecg in ecgs or self.ecgs:
            print(printable(f"{ecg.name}: {ecg.facts}"))
        if not self.ecgs:
            print("The chat has no ECG. /ecg FILE reads one.")

    def _plot(self, path: Path | None) -> None:
        if not self.ecgs:
            raise ValueError("The chat has no ECG to draw. /ecg FILE reads one.")
        if path is not None and path.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"/plot: {path} is no .png or .svg file.")
        paper = ECGPaper()
        for index, ecg in enumerate(self.ecgs):
            output = path or Path(f"{Path(ecg.name).stem}.png")
            if len(self.ecgs) > 1:
                output = output.with_stem(f"{output.stem}-{index + 1}")
            caption = f"{ecg.name}, {paper.speed:g} mm/s, {paper.gain:g} mm/mV, {ecg.prepared.sampling_rate:g} Hz"
            save_picture(output, ecg.prepared, paper, caption)
            print(printable(f"Picture of {ecg.name} in {output.resolve()}"))

    def _why(self, output: Path | None) -> None:
        from elm_ecg.training.evaluation.explain import explain, write  # late: few chats ask why

        if self.num_asked != 1:
            raise ValueError(
                f"/why explains an answer about one ECG; this chat asked about {self.num_asked}. /clear begins a new one."
            )
        (ecg,) = self.ecgs[:1]
        *asked, answer = self.messages
        text = "".join(part["text"] for part in answer["content"])
        model: Any = self.model  # an ELM
        explanation = explain(model, self.processor, ecg.record, _with_places(asked), text)
        paths = write(explanation, output or Path(f"{Path(ecg.name).stem}-why"))
        print(printable(f"{explanation.told()}\nPictures in {', '.join(str(path.resolve()) for path in paths)}"))

    def _save(self, path: Path) -> None:
        if path.suffix.lower() not in (".json", ".jsonl"):
            raise ValueError(f"/save: {path} is no .json file.")
        if all(message["role"] == "system" for message in self.messages):
            raise ValueError("No question was answered yet, so there is no chat to save.")
        write_text(path, json.dumps(self.row(), ensure_ascii=False) + "\n")
        print(f"Chat in {path.resolve()}")


class ServedChat(Chat):
    """A conversation with a model of a server.

    Args:
        served: that model.
        system_prompt: in place of that of the model's training; None: that.
        generation: `max_new_tokens`, `temperature` and `seed` of `ServedModel.answer`.
    """

    def __init__(self, served: ServedModel, system_prompt: str | None = None, **generation: Any) -> None:
        self.served, self.system_prompt, self.name, self.generation = served, system_prompt, served.name, generation
        self.clear()

    def clear(self) -> None:
        """As of `Chat`."""
        super().clear()
        self.told: set[str] = set()  # notices of the server that were printed

    def _answer(self, messages: list[dict[str, Any]]) -> Generator[str, None, None]:
        return self.served.answer(messages, system_prompt=self.system_prompt, **self.generation)

    def _read(self, path: Path, start: float | None, **described: Any) -> ChatECG:
        return read_to_send(path, start, **described)

    @property
    def _system_prompt(self) -> str | None:
        return self.system_prompt

    def _part(self, ecg: ChatECG) -> slice:
        """All from its start on: the server alone knows where the model's part ends."""
        return slice(round(ecg.prepared.metadata["start_second"] * ecg.record.sampling_rate), None)

    def ask(self, question: str) -> Generator[str, None, None]:
        """As of `Chat`; what the server says about the ECGs is printed behind the answer, once."""
        yield from super().ask(question)
        for notice in self.served.notices:
            if notice not in self.told and not any(notice in ecg.facts for ecg in self.ecgs):
                self.told.add(notice)
                yield f"\n({notice})"

    def _why(self, output: Path | None) -> None:
        raise ValueError("/why needs the model here: ask it with `elm chat MODEL`, or `elm explain MODEL FILE`.")


def _with_places(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without their records, whose places stay, as in the rows of a dataset."""
    return [
        {**turn, "content": [{"type": "ecg"} if part["type"] == "ecg" else part for part in turn["content"]]}
        for turn in messages
    ]


def _one(verb: str, arguments: list[str], expected: str) -> Path:
    if len(arguments) != 1:
        raise ValueError(f"{verb} takes one {expected}, but got {len(arguments)} names.")
    path = Path(arguments[0]).expanduser()
    if not path.parent.is_dir():
        raise ValueError(f"{verb}: there is no folder {path.parent}.")
    return path


def history_path() -> Path:
    """Where the lines that were typed are kept, for this user alone."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "elm" / "chat_history"


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier chats at the arrow keys, and file names at the tab key."""
    if readline is None or not sys.stdin.isatty():  # lines of a script are not kept
        yield
        return
    readline.parse_and_bind("tab: complete")
    readline.set_completer_delims(" ")  # else a file name ends at its slashes
    path = history_path()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # others can never read it, not even at first
            path.chmod(0o600)  # a file of an earlier chat may be open to others
            readline.set_history_length(HISTORY_LENGTH)
            readline.write_history_file(path)
            path.chmod(0o600)
        except OSError as error:
            print(f"The lines that you typed are not kept: {error}", file=sys.stderr)


def run(chat: Chat) -> None:
    """Reads lines until /quit or their end. A line that fails ends a script, whose next question might be about an ECG that was
    not read; whoever types is told.

    Raises:
        ValueError: a line of a script, which is on standard input, cannot be done.
    """
    by_hand = sys.stdin.isatty()
    for number in count(1):
        try:
            line = input("> " if by_hand else "").strip()
        except EOFError:
            if by_hand:
                print()
            return
        except UnicodeDecodeError as error:
            raise ValueError(
                f"Standard input is no text in {error.encoding} ({error}); save it in that encoding."
            ) from error
        except KeyboardInterrupt:
            if not by_hand:
                raise
            print("\nCtrl-D or /quit ends the chat.")
            continue
        try:
            if not _do(chat, line):
                return
        except KeyboardInterrupt:
            if not by_hand:
                raise
            print("\n(stopped)")
        except Exception as error:  # whatever it is, the chat goes on
            if by_hand:
                print(printable(f"Error: {sentence(error)}"), file=sys.stderr, flush=True)
            elif isinstance(error, ValueError | OSError | ImportError):
                raise ValueError(
                    f"Line {number} of standard input, {line!r}: {sentence(error)} The lines after it were not read."
                ) from error
            else:
                raise


def _do(chat: Chat, line: str) -> bool:
    """Runs a line, which is a command or a question, and prints what comes of it. Returns whether the chat goes on."""
    if line.startswith("/"):
        return chat.command(line)
    if line:
        if chat.lacks_ecg:
            about = f"about {', '.join(ecg.name for ecg in chat.ecgs)}" if chat.ecgs else "without an ECG"
            print(printable(f"(The last /ecg failed: you ask {about}.)"))
            chat.lacks_ecg = False  # told once
        with contextlib.closing(chat.ask(line)) as answer:
            answered = False
            for piece in answer:
                print(printable(piece), end="", flush=True)
                answered = True
            print("" if answered else "(no answer)")
    return True


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm chat`."""
    return model_parser("chat", __doc__)


def main(argv: list[str] | None = None) -> None:
    """Loads the model, and chats until the user ends it."""
    args = make_parser().parse_args(argv)
    check_options(args)
    generation = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    if args.server is not None:
        served = ServedModel(args.server, args.model, args.api_key)
        print(f"{served.name} at {served.url}. /help lists the commands.\n{DISCLAIMER}\n", flush=True)
        with _history():
            run(ServedChat(served, read_system_prompt(args.system_prompt), seed=args.seed, **generation))
        return
    model, processor, name = load_model(args)
    extractor = processor.feature_extractor
    seconds, leads = extractor.num_samples / extractor.sampling_rate, len(extractor.lead_names)
    reads = f"It reads ECGs of {leads} leads and {seconds:g} s." if processor.takes_ecgs else "It reads no ECG."
    print(f"{args.model}: {reads} /help lists the commands.\n{DISCLAIMER}\n", flush=True)
    with _history():
        run(Chat(model, processor, name, **generation))
