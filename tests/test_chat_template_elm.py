import re

import numpy as np
import pytest
import torch

from elm_ecg.chat_template_elm import ChatTemplate, content_form, ecgs_of
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.collator import ELMCollator
from foreign_templates import FALCON, PHI4, PLAIN, SMOLLM2, message, of_trl, processor_of, tokenizer_for
from helpers import tiny_ecg_byte, tiny_processor

ECG = {"type": "ecg", "ecg": np.zeros((12, 500), dtype=np.float32), "sampling_rate": 250}
ANSWERS = ["sinus rhythm", "é → µV, user: no"]


CHAT = [
    message("user", ECG, "Q"),
    message("assistant", ANSWERS[0]),
    message("user", "and", ECG, ECG),
    message("assistant", ANSWERS[1]),
]
# template -> what it takes, what stands before an answer, what ends it
TEMPLATES = {
    "SmolLM2": (SMOLLM2, "text", "", "<|im_end|>"),
    "Phi-4": (PHI4, "text", "", "<|im_end|>"),
    "Phi-3.5": (of_trl("phi3_5"), "text", "", "<|end|>"),
    "Llama 3": (of_trl("llama3"), "text", "", "<|eot_id|>"),
    "Llama 3.2": (of_trl("llama3_2"), "text", "", "<|eot_id|>"),
    "Gemma 2": (of_trl("gemma"), "text", "", "<end_of_turn>"),
    "Gemma 3": (of_trl("gemma3"), "text", "", "<end_of_turn>"),
    "Gemma 4": (of_trl("gemma4"), "text", "", "<turn|>"),
    "Qwen2.5": (of_trl("qwen2_5"), "text", "", "<|im_end|>"),
    "Qwen2.5-VL": (of_trl("qwen2_5_vl"), "text", "", "<|im_end|>"),
    "Qwen3": (of_trl("qwen3_training"), "text", "<think>\n\n</think>\n\n", "<|im_end|>"),
    "Cohere": (of_trl("cohere"), "text", "", "<|END_OF_TURN_TOKEN|>"),
    "SmolVLM": (of_trl("smolvlm"), "text part", " ", "<end_of_utterance>"),
    "LLaVA-NeXT": (of_trl("llava_next"), "text part", " ", "</s>"),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def case(request):
    template, form, opening, end = TEMPLATES[request.param]
    return processor_of(template), form, opening, end


def test_what_a_template_takes(case):
    processor, form, opening, end = case
    template = processor.template()
    assert content_form(template.text, "<signal>") == form
    assert template.end_of_turn == end
    assert template.opening == opening
    assert processor.stop_token_ids == list(dict.fromkeys(processor.tokenizer.convert_tokens_to_ids([end, "<eos>"])))
    assert processor.answer_opening == opening.strip()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_of_any_template(case, padding_side):
    """Beside a chat of another length, the mask is the answers with their end of turn, and every ECG has its tokens."""
    processor, _, opening, end = case
    batch = processor.apply_chat_template(
        [CHAT, CHAT[:2]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding_side": padding_side},
    )
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    assert len(batch["ecg_values"]) == 4
    assert "offset_mapping" not in batch
    for ids, mask, answers in zip(batch["input_ids"], batch["assistant_masks"], (ANSWERS, ANSWERS[:1]), strict=True):
        assert (ids == processor.ecg_token_id).sum() == (9 if answers is ANSWERS else 3)
        learnt = processor.tokenizer.decode(ids[mask.bool()]).replace(f"{end}\n", end)  # TRL has the newline learnt too
        assert learnt == "".join(f"{opening}{answer}{end}" for answer in answers)


@pytest.mark.parametrize(
    "name", ["llama3", "gemma", "gemma3", "qwen2_5", "qwen2_5_vl", "phi3", "cohere", "smolvlm", "qwen3"]
)
def test_as_the_marks_of_trl(name):
    """TRL's templates for training have the marks that those of the language models lack."""
    own, marked = of_trl(name), of_trl(f"{name}_training")
    tokenizer = tokenizer_for(marked)
    chat = CHAT[:2] if name == "qwen3" else CHAT
    ours, theirs = (ChatTemplate(text, tokenizer, "<signal>") for text in (own, marked))
    assert theirs.marks_answers
    assert not ours.marks_answers
    chat = ours.with_texts(chat)
    whole = ours.render(chat)
    assert whole == theirs.render(chat)
    # TRL has a newline learnt behind the end of turn, and for Qwen2.5 one that is asked with
    expected = [whole[start:end].strip("\n") for start, end in theirs.answer_spans(chat)]
    if name == "phi3":  # the end of the whole text, too
        assert expected.pop() == "<eos>"
    assert [whole[start:end] for start, end in ours.answer_spans(chat)] == expected


def test_an_answer_begins_where_its_prompt_ends(case):
    """What is asked in evaluation is what stands before the answer in training, token for token."""
    processor, *_ = case
    prompt = processor.apply_chat_template(CHAT[:3], tokenize=True, add_generation_prompt=True)[0]
    batch = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt)] == 1
    assert mask[len(prompt) - 1] == 0


def test_answers_are_read_without_what_the_template_writes(case):
    processor, _, opening, end = case
    ids = processor.tokenizer([f"{opening}{answer}{end}" for answer in ("yes", "no <think>")])["input_ids"]
    assert processor.decode_answers(ids) == ["yes", "no <think>"]


@pytest.mark.parametrize("template", [SMOLLM2, of_trl("smolvlm"), of_trl("gemma3")])
def test_strings_are_one_text_part(template):
    processor = processor_of(template)
    strings = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert processor.apply_chat_template(strings) == processor.apply_chat_template(
        [message("user", "Q"), message("assistant", "A")]
    )


@pytest.mark.parametrize("with_ecg", [False, True])
def test_a_literal_placeholder(with_ecg):
    processor = processor_of(SMOLLM2)
    chat = [message("user", *([ECG] if with_ecg else []), "What is <signal>?")]
    with pytest.raises(ValueError, match=rf"has {1 + with_ecg} <signal> placeholders .* for {int(with_ecg)} ECGs"):
        processor.apply_chat_template(chat, tokenize=True)


def test_control_tokens_of_the_user_as_text():
    """transformers' `sanitize_control_tokens`, beside an ECG."""
    processor = processor_of(SMOLLM2)
    chat = [message("system", "S"), message("user", ECG, "a<|im_end|>b")]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True, sanitize_control_tokens=True)[
        "input_ids"
    ][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(processor.ecg_token_id) == 3
    assert "a<|im_end|>b" in processor.decode(ids)


def test_unknown_parts():
    with pytest.raises(ValueError, match="content of type 'image'; expected 'ecg' or 'text'"):
        processor_of(SMOLLM2).apply_chat_template([message("user", {"type": "image"}, "Q")])
    with pytest.raises(ValueError, match="does not take the chat: System role not supported"):
        processor_of(of_trl("gemma"), system_prompt="S").apply_chat_template(CHAT)


def test_ecgs_beside_the_chat():
    part, ecg = {"type": "ecg"}, np.zeros((12, 500), dtype=np.float32)
    processor = processor_of(SMOLLM2)
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"ecgs": [ecg], "sampling_rate": 250}}
    batch = processor.apply_chat_template([message("user", part, "Q")], **options)
    assert batch["input_ids"][0].count(processor.ecg_token_id) == 3
    assert ecgs_of([[message("user", part, "Q"), {"role": "assistant", "content": None}]]) == {}
    with pytest.raises(ValueError, match="1 of 2 ECGs of the chat have no data"):
        processor.apply_chat_template([message("user", part, ECG)], tokenize=True)


def test_symbolic_ecgs():
    """Tokens of ECGs stand in the text, and in an answer are learnt."""
    ecg_byte = tiny_ecg_byte()
    tokenizer = tokenizer_for(SMOLLM2)
    extractor = ECGFeatureExtractor(sampling_rate=100, num_samples=500)
    tokenizer.add_tokens(ELMProcessor.signal_tokens(ecg_byte, extractor.lead_names))
    tokenizer.pad_token = tokenizer.eos_token
    processor = ELMProcessor(extractor, tokenizer, SMOLLM2, 0, "symbolic", ecg_byte=ecg_byte)
    ecg = {"array": np.random.default_rng(0).normal(0, 0.2, (12, 500)), "sampling_rate": 100}
    chat = [message("user", {"type": "ecg", "ecg": ecg}, "Again."), message("assistant", {"type": "ecg", "ecg": ecg})]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, mask in zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True) if mask]
    signals = set(processor.signal_token_ids)
    assert len(learnt) > 50
    assert sum(token in signals for token in learnt) == sum(token in signals for token in batch["input_ids"][0]) / 2
    assert processor.decode(learnt).endswith("\n<|im_end|>")


def test_an_answer_that_names_the_end_of_turn():
    template = ChatTemplate(SMOLLM2, tokenizer_for(SMOLLM2), "<signal>")
    chat = template.with_texts(
        [message("user", "Q"), message("assistant", "a<|im_end|>b"), message("user", "Q"), message("assistant", "c")]
    )
    whole = template.render(chat)
    assert [whole[start:end] for start, end in template.answer_spans(chat)] == ["a<|im_end|>b<|im_end|>", "c<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (
            of_trl("qwen3"),
            CHAT,
            "the answer 'sinus rhythm' otherwise than it asks for it, or otherwise when another turn follows",
        ),
        (of_trl("qwen3_5_think"), CHAT, "the answer 'sinus rhythm' otherwise than it asks for it"),
        (of_trl("gptoss"), CHAT, "the answer 'sinus rhythm' otherwise"),
        (of_trl("deepseek_r1_distill"), CHAT[:2], "the answer 'sinus rhythm' otherwise than it asks for it, so"),
        (FALCON, CHAT, "the answer 'sinus rhythm' otherwise than it asks for it, or otherwise when"),
        (PLAIN, CHAT, "ends an answer with no token, so that a model cannot learn to stop"),
        (
            SMOLLM2.replace("message['content']", "message['content'] | replace(' rhythm', '')"),
            CHAT,
            "leaves out some of the answer 'sinus rhythm'",
        ),
        (SMOLLM2, CHAT[1:], "The chat begins with an answer"),
    ],
)
def test_answers_that_cannot_be_told(template, chat, message):
    writer = ChatTemplate(template, tokenizer_for(template), "<signal>")
    with pytest.raises(ValueError, match=message):
        writer.answer_spans(writer.with_texts(chat))


def test_the_last_answer_alone():
    """A template that writes earlier answers otherwise is learnt from chats of one answer, with reasoning too."""
    text = of_trl("qwen3")
    writer = ChatTemplate(text, tokenizer_for(text), "<signal>")
    chat = writer.with_texts([message("user", "Q"), message("assistant", "<think>Because.</think>Yes")])
    whole, ((start, end),) = writer.render(chat), writer.answer_spans(chat)
    assert whole[start:end] == "<think>\nBecause.\n</think>\n\nYes<|im_end|>"


def test_a_token_that_is_added_later():
    """The tokenizer may get another end of text once it has been asked, as with --eos_token."""
    processor = tiny_processor("default")
    assert processor.template().end_of_turn == "</s>"
    processor.tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert processor.template().end_of_turn == "<end>"
    assert processor.stop_token_ids == [processor.tokenizer.eos_token_id]


def test_every_end_that_is_learnt_ends_generation():
    """An answer that another turn follows may end otherwise than the last, as in gpt-oss."""
    processor = processor_of(of_trl("gptoss_training"))
    template = processor.template()
    whole, chat = template.render(template.with_texts(CHAT)), template.with_texts(CHAT)
    ends = [whole[start:end].rpartition("<")[1:] for start, end in template.answer_spans(chat)]
    assert ["".join(end) for end in ends] == ["<|end|>", "<|return|>"]
    assert template.ends_of_turn == ["<|return|>", "<|end|>"]
    assert processor.tokenizer.convert_ids_to_tokens(processor.stop_token_ids) == ["<|return|>", "<|end|>", "<eos>"]
    assert processor_of(FALCON).template().ends_of_turn == ["<eos>"]
    assert processor_of(PLAIN).template().ends_of_turn == []


def test_a_prompt_within_the_marks_is_not_learnt():
    """gpt-oss is asked with `<|start|>assistant`, which TRL's template marks as the answer's."""
    processor = processor_of(of_trl("gptoss_training"))
    template, chat = processor.template(), processor.template().with_texts(CHAT)
    assert template.marked_prompt == "<|start|>assistant"
    whole, answers = template.render(chat), [message for message in CHAT if message["role"] == "assistant"]
    for (start, end), answer in zip(template.answer_spans(chat), answers, strict=True):
        assert whole[:start].endswith("<|start|>assistant")
        assert re.fullmatch(r"<\|channel\|>final<\|message\|>.*<\|(end|return)\|>", whole[start:end])
        assert answer["content"][-1]["text"] in whole[start:end]
    batch = ELMCollator(processor)(
        [{"messages": [{**m, "content": m["content"][-1].get("text", "more")} for m in CHAT], "ecg": None}]
    )
    learnt = processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0])
    assert learnt.startswith("<|channel|>final<|message|>")
    assert "<|start|>" not in learnt
    # a newline that ends the prompt, and nothing
    assert processor_of(of_trl("qwen2_5_training")).template().marked_prompt == "\n"
    assert processor_of(of_trl("llama3_training")).template().marked_prompt == ""


def test_labels_of_the_collator():
    """The collator learns from a template without marks as from the same one with marks."""
    marked = of_trl("llama3_training")
    rows = [
        {"messages": [{"role": m["role"], "content": m["content"][-1].get("text", "more")} for m in chat], "ecg": None}
        for chat in (CHAT[:2], CHAT)
    ]
    expected, ours = (ELMCollator(processor_of(text))(rows) for text in (marked, of_trl("llama3")))
    assert expected.keys() == ours.keys()
    assert all(torch.equal(expected[name], ours[name]) for name in expected)
    assert (ours["labels"] >= 0).sum() > 20


def test_templates_by_name():
    processor = processor_of(SMOLLM2)
    processor.chat_template = {"default": SMOLLM2, "other": PLAIN}
    assert processor.template().text == SMOLLM2
    assert processor.template("other").text == PLAIN
    assert processor.template(FALCON).text == FALCON
    processor.chat_template = None
    assert processor.stop_token_ids == [processor.tokenizer.eos_token_id]
    assert processor.answer_opening == ""
    with pytest.raises(ValueError, match="has no chat template"):
        processor.apply_chat_template(CHAT)


def test_a_template_that_fails_says_so_where_it_is_rendered():
    processor = processor_of(SMOLLM2)
    processor.chat_template = SMOLLM2 + "{% if messages | length > 1 %}{{ raise_exception('never') }}{% endif %}"
    assert processor.stop_token_ids == [processor.tokenizer.eos_token_id]
    assert processor.answer_opening == ""
    with pytest.raises(ValueError, match="does not take the chat: never"):
        processor.apply_chat_template(CHAT)


def test_white_space_that_is_a_token_ends_nothing():
    """Gemma's tokenizer has newlines among its added tokens."""
    template = SMOLLM2.replace("'<|im_end|>' + '\n'", "'\n<|im_end|>'")
    assert template != SMOLLM2
    tokenizer = tokenizer_for(template)
    tokenizer.add_tokens(["\n"])
    assert ChatTemplate(template, tokenizer, "<signal>").end_of_turn == "<|im_end|>"


THOUGHTS = ["<think>\nRate 48.\n</think>\n<answer>brady</answer>", "<think>Irregular.</think><answer>AF</answer>"]
THINKING_CHAT = [
    message("user", ECG, "Q"),
    message("assistant", THOUGHTS[0]),
    message("user", "and", ECG),
    message("assistant", THOUGHTS[1]),
]
# some strip the thinking of earlier answers, write an empty block or ask within one, mark the answers, or put a blank before them
THINKERS = [
    "qwen2_5",
    "qwen3",
    "qwen3_training",
    "qwen3_5_think",
    "qwen3_5_think_training",
    "qwen3_5_nothink",
    "qwen3_6",
]
THINKERS += [
    "qwen3_5_nothink_training",
    "deepseek_r1_distill",
    "gptoss_training",
    "nemotron_3_nano",
    "smolvlm",
    "gemma",
]


@pytest.fixture(scope="module", params=THINKERS)
def thinker(request):
    return processor_of(of_trl(request.param), explicit_thinking=True)


def test_explicit_thinking_with_any_template(thinker):
    """The opening is given and not learnt; all else stands as it is, of earlier answers too."""
    end = thinker.template().end_of_turn
    batch = thinker.apply_chat_template(
        THINKING_CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    prompt = thinker.apply_chat_template(THINKING_CHAT[:3], tokenize=True, add_generation_prompt=True)[0]
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    learnt = thinker.decode([token for token, one in zip(ids, mask, strict=True) if one])
    expected = rf"Rate 48\.\n</think>\n<answer>brady</answer>(<\|end\|>|{re.escape(end)})\n?Irregular.</think><answer>AF</answer>"
    assert re.match(expected, learnt)
    text = thinker.apply_chat_template(THINKING_CHAT)
    assert THOUGHTS[0] in text
    assert THOUGHTS[1].replace("<think>", "<think>\n") in text
    assert text.count("<think>") == 2
    assert thinker.apply_chat_template(THINKING_CHAT[:1], add_generation_prompt=True).endswith("<think>\n")


def test_answers_are_read_with_what_was_given(thinker):
    ids = thinker.tokenizer(["Rate 48.\n</think>\n<answer>brady</answer>", "</think>yes", ""])["input_ids"]
    assert thinker.decode_answers(ids) == [THOUGHTS[0], "<think>\n</think>yes", ""]
    assert thinker.stop_token_ids == processor_of(thinker.chat_template).stop_token_ids


def test_an_answer_without_thinking_cannot_be_learnt(thinker):
    plain = [message("user", "Q"), message("assistant", "yes")]
    thinker.apply_chat_template([*plain, message("user", "R")], tokenize=True, add_generation_prompt=True)
    with pytest.raises(
        ValueError,
        match=r"The answer 'yes' does not begin with <think>.* or train it without `elm sft --explicit_thinking`",
    ):
        thinker.apply_chat_template(plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)


def test_a_template_that_asks_within_the_thinking_block():
    """As that of Qwen3.5: what an answer thinks is learnt, and its opening is read back."""
    processor = processor_of(of_trl("qwen3_5_think"))
    chat = THINKING_CHAT[:2]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True)
    learnt = [token for token, mask in pairs if mask]
    assert processor.decode(learnt) == "Rate 48.\n</think>\n\n<answer>brady</answer><|im_end|>"
    assert processor.decode_answers([learnt[:-1]]) == ["<think>\nRate 48.\n</think>\n\n<answer>brady</answer>"]
    assert processor.decode_answers(processor.tokenizer(["\n</think>\n\nyes"])["input_ids"]) == ["yes"]


def test_a_template_that_asks_for_no_thinking():
    processor = processor_of(of_trl("qwen3_5_nothink"))
    with pytest.raises(
        ValueError, match="With `elm sft --explicit_thinking` answers that begin with <think> are learnt"
    ):
        processor.apply_chat_template(
            THINKING_CHAT[:2], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )


def test_continuing_an_answer_that_thinks(thinker):
    begun = [*THINKING_CHAT[:3], message("assistant", "<think>\nIrreg")]
    assert thinker.apply_chat_template(begun, continue_final_message=True).endswith("<think>\nIrreg")
