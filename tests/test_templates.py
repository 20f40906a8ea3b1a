import json

import numpy as np
import pytest

from helpers import FAMILIES, ROOT, tiny_processor

ECG = {"type": "ecg", "ecg": np.zeros((12, 500), dtype=np.float32), "sampling_rate": 250}
# the name of each template in the golden file
GOLDEN = {"llama3": "llama-3", "qwen2_5": "qwen-7b-chat", "gemma2": "gemma-2"}
END_OF_TURN = {"llama3": "<|eot_id|>", "qwen2_5": "<|im_end|>", "gemma2": "<end_of_turn>", "default": "</s>"}
EXPECTED = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<signal>\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "qwen2_5": "<|im_start|>user\n<signal>\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "gemma2": "<bos><start_of_turn>user\n<signal>\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<eos>",
    "default": "User: <signal>\nQ\nAssistant: A</s>\n",
}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(value):
    return {"role": "assistant", "content": [text(value)]}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return tiny_processor(family, num_ecg_tokens=3)


def test_every_template_has_a_family():
    names = {path.stem for path in (ROOT / "training" / "templates").glob("*.jinja") if "." not in path.stem}
    assert names == {*FAMILIES, "report"}  # the latter is of reports without a chat


@pytest.mark.parametrize("family", GOLDEN)
def test_golden_prompts(family, shared):
    golden = json.loads((shared / "golden" / "prompts.json").read_text())
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": roles[speaker], "content": [text(value)]} for speaker, value in golden["turns"]]
    chat[0]["content"].insert(0, ECG)
    chat.insert(0, {"role": "system", "content": golden["system"].split()[0]})
    processor = tiny_processor(family, num_ecg_tokens=golden["num_ecg_tokens"])
    prompt = processor.apply_chat_template(chat, tokenize=False)
    assert prompt.replace("<signal>", "<signal>" * golden["num_ecg_tokens"]) == golden["prompts"][GOLDEN[family]]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == golden["prompts"][GOLDEN[family]]


def test_one_turn(processor, family):
    chat = [user(ECG, text("Q")), assistant("A")]
    assert processor.apply_chat_template(chat) == EXPECTED[family]


def test_strings_are_one_text_part(processor):
    parts = [{"role": role, "content": [text(role)]} for role in ("system", "user", "assistant")]
    strings = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    assert processor.apply_chat_template(strings) == processor.apply_chat_template(parts)


def test_white_space_round_texts(processor, family):
    """Kept as in the reference, but for Llama 3, whose own template takes it away."""
    spaced, plain = ([user(text(f"{space}Q{space}")), assistant(f"A{space}")] for space in ("\n", ""))
    same = processor.apply_chat_template(spaced) == processor.apply_chat_template(plain)
    assert same == (family == "llama3")


def test_generation_prompt_is_the_start_of_the_answer(processor):
    """What the model is asked with is a prefix of what it was trained on, and the answer is what comes next."""
    chat = [{"role": "system", "content": "S"}, user(ECG, text("Q"))]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    whole = processor.apply_chat_template([*chat, assistant("A")])
    assert whole.removeprefix(prompt).strip().startswith("A")
    assert whole.startswith(prompt)


def test_the_answer_continues_the_generation_prompt_in_the_mask(processor, family):
    """Everything that the mask leaves out before the first answer is the generation prompt, token for token."""
    chat = [user(ECG, text("Q"))]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)[0]
    whole = processor.apply_chat_template(
        [*chat, assistant("A")], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert whole["input_ids"][0][: whole["assistant_masks"][0].index(1)] == prompt


CHATS = {
    "one turn": [user(ECG, text("Q")), assistant("sinus rhythm")],
    "no ECG": [user(text("Q")), assistant("sinus rhythm")],
    "system": [{"role": "system", "content": "Answer."}, user(ECG, text("Q")), assistant("yes")],
    "two ECGs in one turn": [user(ECG, text("and"), ECG, text("differ?")), assistant("yes")],
    "ECGs before and between": [user(ECG, text("Q")), assistant("one"), user(text("now"), ECG, ECG), assistant("two")],
    "ECG last": [user(text("Q")), assistant("first answer"), user(ECG), assistant("é → µV")],
    "ends with the user": [user(ECG, text("Q")), assistant("one"), user(text("why?"))],
    "answer like a header": [user(ECG, text("assistant")), assistant("assistant\nuser: \n\n")],
}


@pytest.mark.parametrize(("name", "padding_side"), zip(CHATS, ["left", "right"] * 4, strict=True))
def test_assistant_mask(name, padding_side, processor, family):
    """Padded beside a longer chat, the mask is the answers with their end of turn, and nothing else."""
    longer = [user(*[ECG] * 3, text("Q" * 50)), assistant("long " * 10)]
    batch = processor.apply_chat_template(
        [CHATS[name], longer],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding_side": padding_side},
    )
    assert batch["input_ids"].shape == batch["assistant_masks"].shape
    for chat, ids, mask in zip((CHATS[name], longer), batch["input_ids"], batch["assistant_masks"], strict=True):
        answers = [message["content"][0]["text"] for message in chat if message["role"] == "assistant"]
        space = " " if family == "default" else ""
        if family == "llama3":  # its own template takes the white space round texts away
            answers = [answer.strip() for answer in answers]
        expected = "".join(f"{space}{answer}{END_OF_TURN[family]}" for answer in answers)
        if family == "gemma2" and chat[-1]["role"] == "assistant":
            expected += "<eos>"
        assert processor.tokenizer.decode(ids[mask.bool()]) == expected


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_unknown_content_type(kind, processor):
    chat = [user({"type": kind}, text("Q"))]
    for tokenize in (False, True):
        with pytest.raises(
            ValueError, match=f"does not take the chat: content of type '{kind}'; expected 'ecg' or 'text'"
        ):
            processor.apply_chat_template(chat, tokenize=tokenize, return_dict=True)


@pytest.mark.parametrize("role", ["tool", "gpt"])
def test_unknown_role(role, processor):
    chat = [user(text("Q")), {"role": role, "content": "A"}]
    with pytest.raises(ValueError, match=f"does not take the chat: role '{role}'; expected system, user or assistant"):
        processor.apply_chat_template(chat)
