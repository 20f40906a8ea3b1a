import json

import numpy as np
import pytest
import torch
from transformers import pipeline

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.pipeline_elm import as_chat
from helpers import tiny_elm_config, tiny_processor

ECG = np.random.default_rng(0).normal(0, 0.1, (12, 500)).astype(np.float32)
QUESTION = {"ecg": ECG, "sampling_rate": 250, "question": "Rhythm?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    processor = tiny_processor()
    torch.manual_seed(0)
    model = ELMForConditionalGeneration(tiny_elm_config(ecg_token_id=processor.ecg_token_id))
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    np.savez(folder / "ecg.npz", array=ECG, sampling_rate=250, unit="mV")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(model=str(folder), trust_remote_code=True, device="cpu")


def test_the_config_names_it(folder, pipe):
    """One task, which `pipeline` finds by itself; its code stands beside the weights."""
    assert list(json.loads((folder / "config.json").read_text())["custom_pipelines"]) == ["ecg-question-answering"]
    assert (folder / "pipeline_elm.py").is_file()
    assert type(pipe).__module__.startswith("transformers_modules.")
    assert pipe.task == "ecg-question-answering"


def test_one_or_many(folder, pipe):
    one = pipe(QUESTION, max_new_tokens=5)
    assert list(one[0]) == ["answer"]
    several = {"ecg": [str(folder / "ecg.npz"), {"array": ECG, "sampling_rate": 250}], "question": "The same?"}
    inputs = [QUESTION, several, {"question": "Hello?"}]
    alone = [pipe(question, max_new_tokens=5) for question in inputs]
    assert pipe(inputs, batch_size=2, max_new_tokens=5) == alone
    assert list(pipe((question for question in inputs), max_new_tokens=5)) == alone
    assert alone[0] == one
    assert pipe({"ecg": folder / "ecg.npz", "question": "Rhythm?"}, max_new_tokens=5) == one
    assert pipe({**QUESTION, "ecg": ECG.tolist()}, max_new_tokens=5) == one


def test_none(pipe):
    assert pipe([]) == pipe(()) == list(pipe(question for question in [])) == []


def test_as_generate_says(pipe):
    """The answers are those of `generate`, with its options; a system prompt and a chat are part of the prompt."""
    model, processor = pipe.model, pipe.processor
    chat = [{"role": "system", "content": "Be brief."}, *as_chat(QUESTION)]
    assert chat[0] == {"role": "system", "content": "Be brief."}
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, num_beams=2, max_new_tokens=4, num_return_sequences=2)
    texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = [{"answer": text.strip()} for text in texts]
    options = {"num_beams": 2, "num_return_sequences": 2}
    assert pipe(QUESTION, system_prompt="Be brief.", max_new_tokens=4, generate_kwargs=options) == expected
    assert pipe(chat, max_new_tokens=4, **options) == expected
    processor.system_prompt = "Be brief."
    try:
        assert pipe(QUESTION, max_new_tokens=4, **options) == expected
        assert pipe(chat, system_prompt="Be long.", max_new_tokens=4, **options) == expected
        without = pipe.preprocess([QUESTION], system_prompt="")["input_ids"]
        assert without.shape[1] < inputs["input_ids"].shape[1]
    finally:
        processor.system_prompt = None


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("Rhythm?", "got str; expected"),
        ({"ecg": ECG}, "got a dict of ecg; expected"),
        ({"question": "a", "picture": 1}, "got picture beside a question"),
        ({"ecg": ECG, "question": "Rhythm?"}, "sampling"),
        ({"ecg": [[3] * 500] * 12, "question": "Rhythm?", "sampling_rate": 250}, "integers .* without a unit"),
        ({"ecg": [], "question": "Rhythm?"}, 'an empty list of ECGs; leave "ecg" out'),
    ],
)
def test_bad_inputs(question, message, pipe):
    with pytest.raises(ValueError, match=message):
        pipe(question)
    with pytest.raises(ValueError, match="max_new_tokens is given twice"):
        pipe(QUESTION, max_new_tokens=4, generate_kwargs={"max_new_tokens": 4})
