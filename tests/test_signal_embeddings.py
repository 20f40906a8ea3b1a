"""Ids of ECGs beyond the vocabulary of the language model, and the table of embeddings that tokens of symbolic ECGs have."""

import copy
import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from helpers import run_isolated, tiny_elm_config

ECG = 300  # the first id beyond the vocabulary of the tiny language models
FAMILIES = ["llama3", "qwen2_5", "gemma2"]
# what reads the ids of the prompt beside the model
MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "penalty": {"repetition_penalty": 1.5},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3, "repetition_penalty": 1.5},
    "chunks": {"prefill_chunk_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "static cache": {"cache_implementation": "static"},
}


def sensitive(config) -> ELMForConditionalGeneration:
    """A model in which each token counts."""
    torch.manual_seed(0)
    model = ELMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def pair(kind: str, family: str = "llama3") -> tuple[ELMForConditionalGeneration, ELMForConditionalGeneration]:
    """One model with ids beyond the vocabulary, and the same with rows for them, as models of old have."""
    if kind == "placeholder":
        config = tiny_elm_config("patch", family, ecg_token_id=ECG)
    else:  # the last two rows of the vocabulary are spare ones
        table = {"first_signal_token_id": ECG - 2, "num_signal_tokens": 12, "ecg_token_id": ECG + 10}
        config = tiny_elm_config(None, family, representation="symbolic", **table)
    model = sensitive(config)
    old = sensitive(copy.deepcopy(config))
    old.load_state_dict(model.state_dict())
    old.resize_token_embeddings(320)
    rows = old.get_input_embeddings()
    if kind == "symbolic":
        scale = rows(torch.tensor(1)).norm() / rows.weight[1].norm()  # Gemma's embeddings are scaled
        with torch.no_grad():
            rows.weight[ECG - 2 : ECG + 10] = model.model.signal_embeddings.weight / scale
        old.config.first_signal_token_id, old.config.num_signal_tokens, old.model.signal_embeddings = None, 0, None
    old.generation_config.suppress_tokens = list(range(ECG - 2 if kind == "symbolic" else ECG, 320))
    return model, old


def prompt(kind: str) -> dict[str, torch.Tensor]:
    ecg = [ECG] * 4 if kind == "placeholder" else [ECG - 2, ECG + 9, ECG, ECG - 1, ECG]
    ids = torch.tensor([[7, 8, *ecg, 9, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "placeholder":
        inputs["ecg_values"] = torch.randn(1, 12, 500, generator=torch.Generator().manual_seed(0))
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["placeholder", "symbolic"])
def test_logits_are_those_of_rows_of_the_vocabulary(kind, family):
    model, old = pair(kind, family)
    inputs = prompt(kind)
    with torch.no_grad():
        found, expected = model(**inputs).logits, old(**inputs).logits
    assert found.shape[-1] == 300
    words = slice(ECG - 2)  # a tied head has the rows of the tokens
    torch.testing.assert_close(found[..., words], expected[..., words], rtol=1e-4, atol=1e-4)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    if kind == "symbolic":  # another ECG is another answer
        other["input_ids"][0, 3] = ECG + 8
    else:
        other["ecg_values"] = -inputs["ecg_values"]
    assert (model(**other).logits - found)[0, -1].abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["placeholder", "symbolic"])
def test_generation(kind, mode):
    model, old = pair(kind)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **MODES[mode]}
    found, expected = (elm.generate(**prompt(kind), **options)[:, -8:] for elm in (model, old))
    assert torch.equal(found, expected)


def test_spare_rows_are_not_written():
    """Signal tokens that have rows of the head: what is written would be another token when it is read."""
    model, _ = pair("symbolic")
    bonus = nn.functional.one_hot(torch.tensor(ECG - 1), 300) * 1e4
    model.lm_head.register_forward_hook(lambda module, args, output: output + bonus)
    assert model.generate(**prompt("symbolic"), max_new_tokens=4)[:, -4:].max() < ECG - 2


@pytest.mark.parametrize("kind", ["placeholder", "symbolic"])
def test_a_draft_model_without_such_ids(kind):
    model, _ = pair(kind)
    draft = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    inputs = prompt(kind)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=draft), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=model), expected)


def test_the_table_has_gradients_in_every_batch():
    """Zeros where no ECG is, as distributed training expects."""
    model, _ = pair("symbolic")
    for ids in ([[1, 2, 3]], [[1, ECG + 5, 3]]):
        model.zero_grad()
        model(input_ids=torch.tensor(ids), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        taught = model.model.signal_embeddings.weight.grad.any(-1).nonzero().flatten().tolist()
        assert taught == [token_id - (ECG - 2) for token_id in ids[0] if token_id > 290]
        assert not model.get_input_embeddings().weight.grad[0].any()  # which is looked up in their places


def test_one_graph():
    model, _ = pair("symbolic")
    inputs = prompt("symbolic")
    with torch.no_grad():
        found = torch.compile(model.model.embed, backend="eager", fullgraph=True)(inputs["input_ids"])
        assert torch.equal(found, model.model.embed(inputs["input_ids"]))


@pytest.mark.parametrize("family", ["llama3", "qwen2_5"])
def test_saved_and_loaded_without_the_project(family, tmp_path):
    model, _ = pair("symbolic", family)
    model.save_pretrained(tmp_path / "elm")
    torch.save(prompt("symbolic"), tmp_path / "prompt.pt")
    printed = run_isolated(
        """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("elm", trust_remote_code=True)
print(model(**torch.load("prompt.pt")).logits[0, -1, :5].tolist())
print(model.lm_head.weight is model.get_input_embeddings().weight, len(model.lm_head.weight))
""",
        tmp_path,
    ).splitlines()[-2:]
    with torch.no_grad():
        expected = model(**prompt("symbolic")).logits[0, -1, :5].tolist()
    assert eval(printed[0]) == pytest.approx(expected, abs=1e-6)
    assert printed[1] == f"{family == 'qwen2_5'} 300"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_signal_tokens": 3}, "num_signal_tokens=3 with first_signal_token_id=None; give both"),
        ({"first_signal_token_id": 3}, "num_signal_tokens=0 with first_signal_token_id=3; give both"),
        ({"first_signal_token_id": 3, "num_signal_tokens": -1}, "num_signal_tokens=-1"),
        ({"first_signal_token_id": 3, "num_signal_tokens": 2, "ecg_token_id": 4}, "ecg_token_id=4 is one of the 2"),
        (
            {"first_signal_token_id": 3, "num_signal_tokens": 2, "representation": "signal"},
            "num_signal_tokens=2 with representation='signal'; only 'symbolic'",
        ),
    ],
)
def test_tables_that_are_none(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_elm_config(None, **{"representation": "symbolic", **changes})


def test_ids_that_nobody_has_are_an_error():
    for kind, token_id in itertools.product(("placeholder", "symbolic"), (ECG + 15, -1)):
        model, _ = pair(kind)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1, token_id]]))
