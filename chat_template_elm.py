"""Chats with ECGs as the chat template of any language model takes them, and where the answers stand in what it writes."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .ecg_utils import as_record

try:
    from jinja2 import TemplateError
except ImportError:  # transformers says so where it renders
    TemplateError = ValueError  # type: ignore[misc,assignment]

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# an answer that no template writes by itself
PROBE = "Sinus-rhythm-0815"
HINT = "Take another template (`elm sft --chat_template_path`)."
THINK_OPEN = "<think>\n"  # what explicit thinking gives of an answer
# in place of the < of a tag that a template must not see; Unicode has no characters of these numbers
_OPENING, _OTHER = "\ufdd0", "\ufdd1"
_TAG = re.compile(r"<(?=/?think>)")
_BEGUN = re.compile(rf"{_OPENING}think>\n")
# that templates write before an answer without thinking
_EMPTY_BLOCK = re.compile(rf"<think>\s*</think>\s*(?={_OPENING})")
# what may be wrong with a template: it is a program, which raises what it likes
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)

Chat = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
_render_chats: Any = render_jinja_template  # it says that it returns a text; it returns texts and spans


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the tokenizer that it writes for.

    Args:
        text: the Jinja template.
        tokenizer: of the language model; its special tokens are variables of the template.
        ecg_token: what stands in the text for an ECG.
        explicit_thinking: an answer begins with `<think>` and a newline, which its prompt has already. Templates move or leave out
            what an answer thinks, each in its way; here every answer stands in the text as it is, that of an earlier turn too.
    """

    text: str
    tokenizer: Any
    ecg_token: str
    explicit_thinking: bool = False

    def render(self, chat: Chat, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of a chat, as `with_texts` gives it."""
        if add_generation_prompt and self.explicit_thinking:
            begun = self.with_texts([_message("assistant", THINK_OPEN + PROBE)])
            text, _ = self._render([*chat, *begun], **variables)
            return text[: text.rindex(PROBE)].replace(_OPENING, "<")
        return self._render(chat, add_generation_prompt=add_generation_prompt, **variables)[0].replace(_OPENING, "<")

    def _render(self, chat: Chat, **variables: Any) -> tuple[str, list[Span]]:
        """The text of a chat, and if asked for what the template marks in it. The `<think>` that an answer begins with has an
        `_OPENING` there."""
        special = self.tokenizer.special_tokens_map
        chat = [_hidden(message) for message in chat] if self.explicit_thinking else chat
        try:
            (text,), marked = _render_chats([chat], chat_template=self.text, **{**special, **variables})
        except TemplateError as error:
            raise ValueError(f"The chat template does not take the chat: {error}") from error
        spans = [(start, end) for start, end in marked[0]] if marked else []
        for block in reversed([*_EMPTY_BLOCK.finditer(text)]):  # gives way to what the answer thinks
            text = text[: block.start()] + text[block.end() :]
            spans = [(_without(block.span(), start), _without(block.span(), end)) for start, end in spans]
        return text.replace(_OTHER, "<"), spans

    def with_texts(self, chat: Chat) -> Chat:
        """The chat as the template takes it.

        The ECGs of a chat are parts of type `ecg`. A template that knows these gets the chat as it is. To any other the content of a
        message is one text, with the ECG's token and a newline where an ECG stands.

        Raises:
            ValueError: a part is neither ECG nor text, and the template does not know it.
        """
        form = content_form(self.text, self.ecg_token)
        if form == "ecg parts":
            return chat
        changed: list[Mapping[str, Any]] = []
        for message in chat:
            content = message.get("content")
            if content is None:
                changed.append(message)
                continue
            text = content if isinstance(content, str) else "".join(self._text_of_part(part) for part in content)
            changed.append({**message, "content": text if form == "text" else [{"type": "text", "text": text}]})
        return changed

    def _text_of_part(self, part: Mapping[str, Any]) -> str:
        if part["type"] == "ecg":
            return f"{self.ecg_token}\n"
        if part["type"] == "text":
            return part["text"]
        raise ValueError(f"content of type {part['type']!r}; expected 'ecg' or 'text'.")

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what is learnt, with `{% generation %}`."""
        return MARKER.search(self.text) is not None

    @property
    def marked_prompt(self) -> str:
        """What the template marks as the beginning of an answer though it is the end of the prompt, as gpt-oss' does: the model
        never writes it. Most mark nothing of it."""
        if not self.marks_answers:
            return ""
        return _marked_prompt(self, repr(self.tokenizer.special_tokens_map), len(self.tokenizer))

    def _marked(self, chat: Chat, **variables: Any) -> tuple[str, list[Span]]:
        """The text of a chat, and what the template marks in it."""
        return self._render(chat, return_assistant_tokens_mask=True, **variables)

    @property
    def end_of_turn(self) -> str | None:
        """The token that ends an answer: the first one behind it that is no text; None if only text ends it."""
        return _end_of_turn(self, repr(self.tokenizer.special_tokens_map), len(self.tokenizer))

    @property
    def ends_of_turn(self) -> list[str]:
        """The tokens that an answer is learnt to end with: `end_of_turn`, and that of an answer which another turn follows, where
        the template marks another one, as gpt-oss' does. None if only text ends it."""
        if self.end_of_turn is None:
            return []
        return list(dict.fromkeys([self.end_of_turn, *self._marked_ends()]))

    def _marked_ends(self) -> list[str]:
        if not self.marks_answers:  # then all end alike, see `answer_spans`
            return []
        plain = replace(self, explicit_thinking=False)
        chat = self.with_texts([_message("user", "?"), _message("assistant", PROBE)] * 2)
        try:
            whole, spans = plain.render(chat), plain.answer_spans(chat)
        except TEMPLATE_ERRORS:  # where a chat is rendered, it says so
            return []
        ends = [_first_token(self.tokenizer, whole[start:end].partition(PROBE)[2]) for start, end in spans]
        return [end for end in ends if end is not None]

    @property
    def opening(self) -> str:
        """What stands between the prompt and every answer, such as the empty thinking block of Qwen3; nothing with explicit thinking."""
        if self.explicit_thinking:
            return ""
        chat = self.with_texts([_message("user", "?"), _message("assistant", PROBE)])
        try:
            prompt, whole = self.render(chat[:1], add_generation_prompt=True), self.render(chat)
        except TEMPLATE_ERRORS:  # where a chat is rendered, it says so
            return ""
        return whole[len(prompt) :].partition(PROBE)[0] if whole.startswith(prompt) else ""

    @property
    def given(self) -> str:
        """What a prompt has of the answer already: `<think>` and a newline with explicit thinking, and of templates that write them
        themselves, as that of Qwen3.5; of others nothing."""
        try:
            prompt = self.render(self.with_texts([_message("user", "?")]), add_generation_prompt=True)
        except TEMPLATE_ERRORS:  # where a chat is rendered, it says so
            return ""
        return THINK_OPEN if prompt.endswith(THINK_OPEN) else ""

    def answer_spans(self, chat: Chat, **variables: Any) -> list[Span]:
        """Where the answers of a chat stand in its text: [start, end) in characters, the end of turn included.

        They are what the template marks with `{% generation %}`, but for its `marked_prompt`. Without such marks, each begins where the prompt for it ends, and
        ends with the token that ends a turn. With explicit thinking they begin behind what the prompt gives of them.

        Args:
            chat: as `with_texts` gives it.

        Raises:
            ValueError: the template has no marks, and does not write an answer behind its prompt, whole, and alike whether another
                turn follows or not: nobody could tell what is to be learnt. Or with explicit thinking an answer begins without it.
        """
        if self.explicit_thinking:
            _check_thinking(chat)
        if self.marks_answers:
            whole, spans = self._marked(chat, **variables)
            if self.explicit_thinking:
                begun = [match.end() for match in _BEGUN.finditer(whole)]
                return [
                    (max([start, *(place for place in begun if start < place <= end)]), end) for start, end in spans
                ]
            asked = self.marked_prompt
            return [(start + len(asked) * whole.startswith(asked, start), end) for start, end in spans]
        whole = self.render(chat, **variables)
        places = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
        return [self._answer_span(chat, place, whole, **variables) for place in places]

    def _answer_span(self, chat: Chat, place: int, whole: str, **variables: Any) -> Span:
        """Where the answer at this place of the chat stands in the `whole` text."""
        end_of_turn, answer = self.end_of_turn, _text_of(chat[place].get("content"))
        if end_of_turn is None:
            raise ValueError(
                f"The chat template ends an answer with no token, so that a model cannot learn to stop. {HINT}"
            )
        if place == 0:
            raise ValueError("The chat begins with an answer; the chat template needs a question before it.")
        prompt = self.render(chat[:place], add_generation_prompt=True, **variables)
        start, number = len(prompt), answer.count(end_of_turn) + 1  # an answer that names the token does not end there
        *turn, rest = whole[start:].split(end_of_turn, number)
        end = len(whole) - len(rest)
        # the model is asked for the last answer: those before it have to be written as if they were the last
        is_last = place == len(chat) - 1
        alone = whole if is_last else self.render(chat[: place + 1], **variables)
        if not (len(turn) == number and whole.startswith(prompt) and alone[:end] == whole[:end]):
            raise ValueError(
                f"The chat template writes the answer {answer[:40]!r} otherwise than it asks for it"
                f"{'' if is_last else ', or otherwise when another turn follows'}, so what is to be learnt cannot be told. {HINT}"
                f"{' With `elm sft --explicit_thinking` answers that begin with <think> are learnt with any template.' if thinks(answer) else ''}"
            )
        given = THINK_OPEN if prompt.endswith(THINK_OPEN) else ""
        if _without_space(answer) not in _without_space(given + whole[start:end]):
            raise ValueError(f"The chat template leaves out some of the answer {answer[:40]!r}. {HINT}")
        return start, end


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())


def thinks(answer: str) -> bool:
    """Whether an answer begins with `<think>`."""
    return answer.lstrip().startswith("<think>")


def _check_thinking(chat: Chat) -> None:
    """ValueError: an answer of the chat does not begin with `<think>`."""
    for message in chat:
        if message["role"] == "assistant" and not thinks(answer := _text_of(message.get("content"))):
            raise ValueError(
                f"The answer {answer[:40]!r} does not begin with <think>, and the model is to think before each; leave such rows out of "
                "the data, or train it without `elm sft --explicit_thinking`."
            )


def _hidden(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with the tags of thinking of an answer as no template knows them; each is as long as before. The white space that
    follows the first is one newline."""
    content = message.get("content")
    if message["role"] != "assistant" or not content:
        return message
    if isinstance(content, str):
        return {**message, "content": _hidden_text(content)}
    parts = [
        {**part, "text": _hidden_text(part["text"], place == 0)} if "text" in part else part
        for place, part in enumerate(content)
    ]
    return {**message, "content": parts}


def _hidden_text(text: str, leads: bool = True) -> str:
    if not (leads and thinks(text)):
        return _TAG.sub(_OTHER, text)
    rest = text.lstrip().removeprefix("<think>").lstrip()
    return f"{_OPENING}{THINK_OPEN[1:]}{_TAG.sub(_OTHER, rest)}"


def _without(cut: Span, place: int) -> int:
    """Where a place of a text is once the `cut` is taken out of it."""
    start, end = cut
    return place if place <= start else max(start, place - (end - start))


def _without_space(text: str) -> str:
    return "".join(text.split())


@lru_cache(maxsize=16)
def _end_of_turn(template: ChatTemplate, special_tokens: str, num_tokens: int) -> str | None:
    """As `ChatTemplate.end_of_turn`; the special tokens and the number of tokens are what the tokenizer may have got since."""
    chat = template.with_texts([_message("user", "?"), _message("assistant", PROBE)])
    try:
        behind = template.render(chat).partition(PROBE)[2]
    except TEMPLATE_ERRORS:  # where a chat is rendered, it says so
        return None
    return _first_token(template.tokenizer, behind)


@lru_cache(maxsize=16)
def _marked_prompt(template: ChatTemplate, special_tokens: str, num_tokens: int) -> str:
    """As `ChatTemplate.marked_prompt`; the other arguments as of `_end_of_turn`."""
    chat = template.with_texts([_message("user", "?"), _message("assistant", PROBE)])
    try:
        prompt, (whole, spans) = template.render(chat[:1], add_generation_prompt=True), template._marked(chat)
    except TEMPLATE_ERRORS:  # where a chat is rendered, it says so
        return ""
    return prompt[spans[0][0] :] if spans and whole.startswith(prompt) else ""


def _first_token(tokenizer: Any, text: str) -> str | None:
    """The first token of a text that is none of its words; None if there is none."""
    added = tokenizer.added_tokens_decoder
    for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token_id in added and not added[token_id].content.isspace():  # Gemma adds newlines too
            return added[token_id].content
    return None


@lru_cache(maxsize=16)
def content_form(template: str, ecg_token: str) -> str:
    """What a template takes as the content of a message.

    Returns:
        `ecg parts`: a list with parts of type `ecg`; `text`; or `text part`: a list of a part of type `text`. `ecg parts` too for a
        template that can write none of them, and says so itself where it is rendered.
    """
    text = f"{ecg_token}\n{PROBE}"
    contents: dict[str, Any] = {
        "ecg parts": [{"type": "ecg"}, {"type": "text", "text": PROBE}],
        "text": text,
        "text part": [{"type": "text", "text": text}],
    }
    no_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    for form, content in contents.items():
        chat = [{"role": "user", "content": content}]
        try:
            (rendered,), _ = _render_chats([chat], chat_template=template, add_generation_prompt=True, **no_tokens)
        except TEMPLATE_ERRORS:
            continue
        if rendered.count(PROBE) == rendered.count(ecg_token) == 1:
            return form
    return "ecg parts"


def ecgs_of(chats: Sequence[Chat]) -> dict[str, Any]:
    """The ECGs that stand in the chats, as the keyword `ecgs` of the processor; nothing where they have no data."""
    contents = [message["content"] for chat in chats for message in chat if message.get("content")]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    ecgs = [_ecg_of(part) for part in parts if part["type"] == "ecg"]
    with_data = [ecg for ecg in ecgs if ecg is not None]
    if not with_data:  # text alone, or ECGs given beside the chats
        return {}
    if len(with_data) < len(ecgs):
        raise ValueError(
            f"{len(ecgs) - len(with_data)} of {len(ecgs)} ECGs of the chat have no data; give each its 'ecg' or 'path', "
            'or none and all of them as processor_kwargs={"ecgs": [...]}.'
        )
    return {"ecgs": with_data}


def _ecg_of(part: Mapping[str, Any]) -> Any:
    ecg = part.get("path") if part.get("ecg") is None else part["ecg"]  # no `or`: an array has no truth value
    described = {key: part[key] for key in ("sampling_rate", "lead_names", "unit") if part.get(key) is not None}
    if ecg is None or not described:
        return ecg
    if isinstance(ecg, (str, os.PathLike, Mapping)):  # may hold some of it too
        return as_record(ecg, **described)
    return {"array": ecg, **described}


__all__ = ["ChatTemplate", "ecgs_of"]
