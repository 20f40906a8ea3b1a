"""The chat template of a new ELM, or another one for it."""

from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import has_generation_markers

from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.files import resource
from elm_ecg.training.model_files import find_model_file

# a token that only tokenizers of that family have -> its chat template
TEMPLATES = {"<|start_header_id|>": "llama3", "<|im_start|>": "qwen2_5", "<start_of_turn>": "gemma2"}


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of the tokenizer's family, with `{% generation %}` round what is learnt."""
    vocabulary = tokenizer.get_vocab()
    name = next((name for token, name in TEMPLATES.items() if token in vocabulary), "default")
    return resource(f"training/templates/{name}.jinja").read_text()


def set_chat_template(processor: ELMProcessor, name_or_path: str | None) -> None:
    """Gives the processor another chat template; None keeps its own.

    Args:
        name_or_path: a file of Jinja, or the folder or Hub id of a model whose tokenizer has a template.

    Raises:
        ValueError: there is no template, it cannot be rendered, does not mark the answers, or leaves ECGs out.
    """
    if name_or_path is None:
        return
    label = "--chat_template_path"
    if Path(name_or_path).is_file():
        template = Path(name_or_path).read_text(encoding="utf-8")
    else:
        place, _ = find_model_file(name_or_path, ["tokenizer_config.json"], label=label)
        template = AutoTokenizer.from_pretrained(place, trust_remote_code=False).chat_template
    if isinstance(template, dict):  # named ones
        template = template.get("default")
    if not template:
        raise ValueError(f"{label} {name_or_path} has no chat template; name a .jinja file.")
    if not has_generation_markers(template):
        raise ValueError(
            f"{label} {name_or_path} does not mark what is to be learnt; put {{% generation %}} and {{% endgeneration %}} round the "
            f"assistant's turns, as the templates in {resource('training/templates')} do."
        )
    chat = [
        {"role": "user", "content": [{"type": "ecg"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
    ]
    try:
        text = processor.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"{label} {name_or_path} cannot be rendered: {error}") from error
    if processor.takes_ecgs and text.count(processor.ecg_token) != 1:
        raise ValueError(
            f"{label} {name_or_path} writes no {processor.ecg_token} for a part of type 'ecg'; add it, as the templates in "
            f"{resource('training/templates')} do."
        )
    processor.chat_template = template
