import re

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from elm_ecg.chat_template_elm import ChatTemplate
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.chat_templates import choose_chat_template, learnable, set_chat_template, stop_at_end_of_turn
from foreign_templates import FALCON, PHI4, PLAIN, SMOLLM2, message, of_trl, tokenizer_for
from helpers import FAMILIES, ROOT, tiny_elm_config, tiny_processor, tiny_tokenizer

CHAT = [message("user", "Q"), message("assistant", "A"), message("user", "R"), message("assistant", "B")]
TODAY = "{{ strftime_now('%d %B %Y') }}"


def ours(name):
    return (ROOT / "training" / "templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_without_a_template(family):
    template, origin = choose_chat_template(tiny_tokenizer(family), "owner/name")
    assert template == ours(family)
    assert origin.startswith(f"{family}.jinja of elm-ecg")
    assert origin.endswith(", as owner/name has no chat template")
    assert ("for the control tokens <|im_start|> and <|im_end|>" in origin) is (family == "qwen2_5")


def test_one_control_token_is_not_enough():
    tokenizer = tiny_tokenizer("default")
    tokenizer.add_tokens(["<|im_start|>", "<|start_header_id|>", "<start_of_turn>"], special_tokens=True)
    assert choose_chat_template(tokenizer, "owner/name")[0] == ours("default")


@pytest.mark.parametrize(
    "template", [SMOLLM2, PHI4, of_trl("phi3_5"), of_trl("gemma3"), of_trl("smolvlm"), ours("default")]
)
def test_its_own(template):
    tokenizer = tokenizer_for(template)
    assert choose_chat_template(tokenizer, "/home/me/models/name") == (template, "that of name")
    tokenizer.chat_template = {"default": template, "tool_use": "{{ messages }}"}
    assert choose_chat_template(tokenizer, "owner/name") == (template, "that of owner/name")


@pytest.mark.parametrize(
    ("name", "family", "difference"),
    [
        ("llama3", "llama3", "without its system message of dates"),
        ("llama3_2", "llama3", "without its system message of dates"),
        ("qwen2_5", "qwen2_5", "without its default system prompt"),
        ("gemma", "gemma2", "but a system message is left out"),
    ],
)
def test_those_of_the_reference(name, family, difference):
    """Ours write what the template of the very model writes, but for what is told."""
    own = of_trl(name)
    tokenizer = tokenizer_for(own)
    tokenizer.add_special_tokens({"bos_token": FAMILIES[family][0] or "<bos>"})
    template, origin = choose_chat_template(tokenizer, "owner/name")
    assert template == ours(family)
    assert origin.startswith(f"{family}.jinja of elm-ecg: that of owner/name, {difference}")
    texts = []
    for text in (own, template):
        writer = ChatTemplate(text, tokenizer, "<signal>")
        texts.append(writer.render(writer.with_texts(CHAT)).removesuffix("<eos>"))
    without_system = re.sub(
        r"(<\|start_header_id\|>|<\|im_start\|>)system.*?(<\|eot_id\|>|<\|im_end\|>\n)", "", texts[0], flags=re.S
    )
    assert texts[1] == without_system
    assert (texts[1] != texts[0]) is (name in ("llama3_2", "qwen2_5"))
    tokenizer.chat_template = own + " "  # not the very same
    assert choose_chat_template(tokenizer, "owner/name")[0] != template


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss", "glm4moe"])
def test_trl_changes_some_for_training(name):
    tokenizer = tokenizer_for(of_trl(name))
    template, changes = learnable(tokenizer, of_trl(name))
    assert changes.startswith(", as TRL changes it for training")
    trained = of_trl(f"{name}_training")
    same = name in ("qwen3", "glm4moe")  # the others have a date, or marks too early
    assert (template == trained) is same
    writer = ChatTemplate(template, tokenizer, "<signal>")
    chat = writer.with_texts(CHAT)
    assert len(writer.answer_spans(chat)) >= 2
    if name == "qwen3_5_think":  # its prompt ends within the thinking block
        assert writer.render(chat) == ChatTemplate(trained, tokenizer, "<signal>").render(chat)
        assert "if true" in template
    # a change of its text: TRL does not know it
    if name == "qwen3":
        template, changes = learnable(tokenizer, of_trl(name) + "{# mine #}")
        assert template == of_trl(name) + "{# mine #}"
        assert changes.startswith(", for chats of one answer, as it writes")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (of_trl("deepseek_r1_distill"), "writes an answer otherwise than it asks for it"),
        (PLAIN, "does not end an answer with a token of the language model"),
        ("{{ messages[0]['content'] + eos_token }}", "does not end an answer with a token"),
    ],
)
def test_one_that_cannot_be_learnt(template, why, tmp_path):
    """Of the language model itself: ours in its place, and it is told; one that the user names is an error."""
    tokenizer = tokenizer_for(template)
    got, origin = choose_chat_template(tokenizer, "owner/name")
    assert got == ours("default")
    assert re.fullmatch(rf"default.jinja of elm-ecg, as the one of owner/name cannot be learnt: .*({why}).*", origin)
    processor = tiny_processor()
    (tmp_path / "a.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"^--chat_template_path .*a.jinja: .*({why}|no token|token of the language)"):
        set_chat_template(processor, str(tmp_path / "a.jinja"))
    assert processor.chat_template == ours("llama3")


def test_the_last_answer_alone_has_an_end():
    assert learnable(tokenizer_for(FALCON), FALCON)[1].startswith(", for chats of one answer")


def test_no_template_depends_on_the_day():
    template = TODAY + SMOLLM2
    fixed, changes = learnable(tokenizer_for(template), template)
    assert fixed == "{{ '26 July 2024' }}" + SMOLLM2
    assert changes == ", with 26 July 2024 for today"
    double = template.replace("'%d %B %Y'", '"%d %b"')
    assert learnable(tokenizer_for(double), double)[0] == "{{ '26 Jul' }}" + SMOLLM2


def test_marks_that_begin_too_early():
    """As those of SmolLM3, which have the header of the answer in them. The text stays what it was."""
    marked = (
        "{%- for message in messages -%}\n    {% generation %}\n    {%- if true -%}\n        {{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>\\n' }}\n    {%- endif -%}\n    {% endgeneration %}\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )
    tokenizer = tokenizer_for(marked)
    template, changes = learnable(tokenizer, marked)
    assert changes == ", without its {% generation %}, in which is what the model is asked with"
    before, after = (ChatTemplate(text, tokenizer, "<signal>") for text in (marked, template))
    chat = after.with_texts(CHAT)
    whole = after.render(chat)
    assert whole == before.render(chat)
    assert [whole[start:end] for start, end in after.answer_spans(chat)] == ["A<|im_end|>", "B<|im_end|>"]
    assert learnable(tokenizer_for(ours("gemma2")), ours("gemma2")) == (ours("gemma2"), "")


class Writes(LogitsProcessor):
    """Has a model write given tokens, whatever its weights say."""

    def __init__(self, ids, start):
        self.ids, self.start = ids, start

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e9)
        scores[:, self.ids[input_ids.shape[1] - self.start]] = 0
        return scores


@pytest.mark.parametrize("eos", [None, 3, [3, 4]])
def test_the_end_of_turn_ends_generation(eos, tmp_path):
    """Of a base language model too, which knows the end of a text alone; saved with the model."""
    processor = tiny_processor("qwen2_5")
    processor.tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model = ELMForConditionalGeneration(tiny_elm_config(None))
    model.generation_config.eos_token_id = eos
    stop_at_end_of_turn(model, processor)
    end = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    known = [] if eos is None else [eos] if isinstance(eos, int) else eos
    assert model.generation_config.eos_token_id == [*known, *end]
    stop_at_end_of_turn(model, processor)
    assert model.generation_config.eos_token_id == [*known, *end]
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [*known, *end]
    inputs = processor.apply_chat_template(
        CHAT[:1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    answer = [*processor.tokenizer("yes")["input_ids"], end[0], *processor.tokenizer("and on and on")["input_ids"]]
    writes = LogitsProcessorList([Writes(answer, inputs["input_ids"].shape[1])])
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, logits_processor=writes)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == answer[:4]


def test_what_is_known_already_stays():
    processor, model = tiny_processor(), ELMForConditionalGeneration(tiny_elm_config(None))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    stop_at_end_of_turn(model, processor)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
