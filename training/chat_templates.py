"""Which chat template an ELM gets, and why."""

import re
from copy import copy
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from elm_ecg.chat_template_elm import PROBE, TEMPLATE_ERRORS, ChatTemplate
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.files import resource
from elm_ecg.training.markdown import public_name
from elm_ecg.training.model_files import find_model_file

# our templates, and the control tokens that each needs: those of a language model that has them all, and no template
TEMPLATES = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "gemma2": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
}
# our templates of the reference's language models, by what name TRL keeps the texts of these models' own, and how ours differ
MADE_FOR = {
    "llama3": (
        ("llama3_chat_template", "llama3_1_chat_template", "llama3_2_chat_template"),
        "without its system message of dates",
    ),
    "qwen2_5": (("qwen2_5_chat_template",), "without its default system prompt"),
    "gemma2": (("gemma_chat_template",), "but a system message is left out instead of refused"),
}
# in place of today: the same prompts on every day. What Llama 3's own template takes where there is no clock
DATE = date(2024, 7, 26)
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
RHYTHM = "Which-rhythm-0815"
MARKS = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
QUESTION = {"role": "user", "content": [{"type": "ecg"}, {"type": "text", "text": RHYTHM}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}


def choose_chat_template(tokenizer: PreTrainedTokenizerBase, llm: str) -> tuple[str, str]:
    """The chat template of a new ELM, and in words where it is from and why it was taken.

    It is the language model's own, but for three cases: it has none, its own cannot be learnt, or it is one of the reference's
    language models. Those get ours, the last so that prompts are the reference's: without a date or a default system prompt.
    """
    from trl import chat_template_utils

    name, own = public_name(llm), _default(tokenizer.chat_template)
    if not own:
        template, ours = family_template(tokenizer)
        return template, f"{ours}, as {name} has no chat template"
    for ours, (constants, difference) in MADE_FOR.items():
        if own in [getattr(chat_template_utils, constant) for constant in constants]:
            return _ours(ours), f"{ours}.jinja of elm-ecg: that of {name}, {difference}, as in the reference"
    try:
        template, changes = learnable(tokenizer, own)
    except ValueError as error:
        template, ours = _ours("default"), "default.jinja of elm-ecg"
        return template, f"{ours}, as the one of {name} cannot be learnt: {error}"
    return template, f"that of {name}{changes}"


def family_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Our template for the control tokens of a tokenizer, and its name in words."""
    vocabulary = tokenizer.get_vocab()
    for name, tokens in TEMPLATES.items():
        if all(token in vocabulary for token in tokens):
            return _ours(name), f"{name}.jinja of elm-ecg, for the control tokens {tokens[-2]} and {tokens[-1]}"
    return _ours("default"), "default.jinja of elm-ecg"


def _ours(name: str) -> str:
    return resource(f"training/templates/{name}.jinja").read_text(encoding="utf-8")


def _default(template: Any) -> str | None:
    return template.get("default") if isinstance(template, dict) else template  # named ones


def learnable(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """A chat template that answers are learnt from, and in words how it was changed for that.

    Some write an answer otherwise when another turn follows, or than they ask for it: where TRL knows the template, its own for
    training is taken. One that is at fault for later turns alone stays as it is. The date of the day is fixed.

    Raises:
        ValueError: it cannot be rendered, loses the question, the answer or an ECG, or does not end an answer with a token.
    """
    from trl.chat_template_utils import get_training_chat_template

    changes = ""
    try:
        check(tokenizer, template, num_answers=2)
    except ValueError:
        twin: Any = copy(tokenizer)
        twin.chat_template = template
        try:
            trained = get_training_chat_template(twin) or template
            check(tokenizer, trained, num_answers=2)
            template, changes = trained, ", as TRL changes it for training"
        except ValueError:  # TRL does not know it, or keeps what is at fault
            check(tokenizer, template, num_answers=1)
            changes = ", for chats of one answer, as it writes an answer otherwise when another turn follows"
    if (unmarked := _without_early_marks(tokenizer, template)) != template:
        template, changes = (
            unmarked,
            f"{changes}, without its {{% generation %}}, in which is what the model is asked with",
        )
    template, dates = TODAY.subn(lambda match: repr(DATE.strftime(match[2])), template)
    return template, f"{changes}, with {DATE:%d %B %Y} for today" if dates else changes


def _without_early_marks(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template without marks that begin before the prompt of an answer ends, as in SmolLM3's: no model writes that part."""
    if not ChatTemplate(template, tokenizer, ELMProcessor.ecg_token).marked_prompt:
        return template
    # a block that does nothing takes as much white space away
    unmarked = MARKS.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)
    try:
        check(tokenizer, unmarked, num_answers=2)
    except ValueError:  # its marks are the better guide
        return template
    return unmarked


def check(tokenizer: PreTrainedTokenizerBase, template: str, num_answers: int) -> None:
    """ValueError: the answers of a chat of so many cannot be learnt from the template, see `learnable`."""
    writer = ChatTemplate(template, tokenizer, ELMProcessor.ecg_token)
    try:
        asked = writer.render(writer.with_texts([QUESTION]), add_generation_prompt=True)
        chat = writer.with_texts([QUESTION, ANSWER] * num_answers)
        whole, end = writer.render(chat), writer.end_of_turn
    except TEMPLATE_ERRORS as error:
        raise ValueError(f"it cannot be rendered: {error}") from error
    if not asked.count(RHYTHM) == asked.count(writer.ecg_token) == 1:
        raise ValueError(f"it does not write the question and {writer.ecg_token} for its ECG")
    if end is None:
        raise ValueError(
            "it does not end an answer with a token of the language model, so a model cannot learn to stop"
        )
    if not whole.startswith(asked):
        raise ValueError("it writes an answer otherwise than it asks for it")
    learnt = [whole[start:stop] for start, stop in writer.answer_spans(chat)]
    if "".join(learnt).count(PROBE) != num_answers or not any(end in text for text in learnt):
        raise ValueError(f"what it marks with {{% generation %}} is not each answer with its end of turn {end}")


def set_chat_template(processor: ELMProcessor, name_or_path: str | None) -> None:
    """Gives the processor another chat template; None keeps its own.

    Args:
        name_or_path: a file of Jinja, or the folder or Hub id of a model whose tokenizer has a template.

    Raises:
        ValueError: there is no template, or it is not `learnable`.
    """
    if name_or_path is None:
        return
    label = "--chat_template_path"
    if Path(name_or_path).is_file():
        template = Path(name_or_path).read_text(encoding="utf-8")
    else:
        place, _ = find_model_file(name_or_path, ["tokenizer_config.json"], label=label)
        template = _default(AutoTokenizer.from_pretrained(place, trust_remote_code=False).chat_template) or ""
    if not template:
        raise ValueError(f"{label} {name_or_path} has no chat template; name a .jinja file.")
    try:
        template, changes = learnable(processor.tokenizer, template)
    except ValueError as error:
        raise ValueError(
            f"{label} {name_or_path}: {error}; the templates in {resource('training/templates')} show how."
        ) from error
    processor.chat_template = template
    processor.chat_template_origin = f"that of {public_name(name_or_path)}, named with {label}{changes}"


def stop_at_end_of_turn(model: ELMForConditionalGeneration, processor: ELMProcessor) -> None:
    """Adds what ends an answer to what ends generation: base language models stop at the end of a text alone."""
    config: Any = model.generation_config
    known = config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if missing := [token_id for token_id in processor.stop_token_ids if token_id not in known]:
        config.eos_token_id = [*known, *missing]


def for_reports(processor: ELMProcessor) -> ELMProcessor:
    """A processor of the same parts that writes no chat but an ECG's report: the text begins, then come the ECGs, a newline, and what
    is learnt, the report and the end of the text. The text begins with a token of that kind where the tokenizer has one.

    Raises:
        ValueError: the tokenizer has no token that ends a text.
    """
    if processor.tokenizer.eos_token is None:
        raise ValueError(
            "--train_phase pretrain: the language model's tokenizer has no end-of-text token, so that a model cannot learn to end a "
            "report; name another with --eos_token."
        )
    processor = copy(processor)
    processor.chat_template, processor.system_prompt, processor.explicit_thinking = _ours("report"), None, False
    return processor
