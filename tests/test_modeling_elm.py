import functools
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GenerationConfig,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    ViTConfig,
)

from elm_ecg import modeling_elm
from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_elm import IMAGE_REPRESENTATIONS, connectors_of
from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord
from elm_ecg.modeling_connectors import CONNECTOR_MODULES
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_elm import ECG_INPUTS, ELMForConditionalGeneration
from elm_ecg.training.sharing.convert import convert_state_dict
from helpers import (
    TINY_ENCODERS,
    TINY_VISION,
    golden_state_dict,
    run_isolated,
    save_tiny_llm,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor,
    tiny_image_processor_elm,
    tiny_llm_config,
    tiny_processor,
    tiny_tokenizer,
)

FAMILIES = ["llama3", "qwen2_5", "gemma2"]
FUYU = connectors_of("fuyu")
ECG_PARTS = [*TINY_ENCODERS, *FUYU]
# every encoder with every connector of llava, the connectors of fuyu, and text only
PAIRINGS = [(encoder, {"connector": name}) for encoder in TINY_ENCODERS for name in connectors_of("llava")]
PAIRINGS += [(ecg_part, {}) for ecg_part in [*FUYU, None]]
# the vision backbones with every kind of picture, and two others of which anyone will do
IMAGE_PAIRINGS = [
    (backbone, {"representation": name})
    for backbone in ("clip_vision_model", "siglip2_vision_model", "vit")
    for name in IMAGE_REPRESENTATIONS
]
IMAGE_PAIRINGS += [("dinov2", {"representation": "rgb"}), ("resnet", {"representation": "stacked_signal"})]
EMBEDDING = {"image_features": "embedding", "num_ecg_tokens": 1}
EMBEDDING_PAIRINGS = [(backbone, {"representation": "rgb", **EMBEDDING}) for backbone in TINY_VISION]


def ids(pairings):
    return ["-".join(map(str, (ecg_part, *changes.values()))) for ecg_part, changes in pairings]


# each pairing with one family, each family with a third of them; with the others, of which it knows nothing, before a release
OF_FAMILIES = [
    pytest.param(
        *pairing,
        family,
        id=f"{name}-{family}",
        marks=[] if (index + place) % len(FAMILIES) == 0 else [pytest.mark.slow, pytest.mark.minutes],
    )
    for index, (pairing, name) in enumerate(zip(PAIRINGS, ids(PAIRINGS), strict=True))
    for place, family in enumerate(FAMILIES)
]


# what the connector does not read, so that nothing teaches it
UNUSED = {
    "clip_vision_model": ("post_layernorm",),
    "siglip2_vision_model": ("head",),
    "vit": ("pooler",),
    "dinov2": ("mask_token",),
    "xresnet1d": ("convs.0.", "convs.1.conv."),  # a new block is its shortcut: what leads to its last norm learns later
}
UNUSED_BY_EMBEDDING = {"vit": ("pooler", "encoder.layernorm"), "dinov2": ("mask_token",)}
PLACEHOLDER = 299
NEW_TOKENS = 7
MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams, two answers": {"num_beams": 3, "num_return_sequences": 2},
}


def tiny_elm(ecg_part="merl", family="llama3", **changes):
    """In float32 and eval mode, so sensitive that another ECG makes another answer.

    Random weights make much the same of all records: the features are centred and scaled to a deviation of 1 here.
    """
    torch.manual_seed(0)
    if ecg_part in TINY_VISION:
        config = tiny_image_elm_config(ecg_part, family=family, **changes)
    else:
        config = tiny_elm_config(ecg_part, family, **changes)
    model = ELMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        if ecg_part is not None:
            connector = model.model.connector
            *_, last = (module for module in connector.modules() if isinstance(module, nn.Linear))
            features = model.get_ecg_features(**ecg_inputs(model))
            last.bias.sub_(features.mean((0, 1))).div_(features.std((0, 1)))
            last.weight.div_(features.std((0, 1))[:, None])
    return model


def records(number):
    return torch.randn(number, 12, 500, generator=torch.Generator().manual_seed(0))


@functools.cache
def pictures(backbone, representation):
    """Of records of 5, 10 and 5 seconds, which SigLIP2 reads in patches of different numbers."""
    noise = 0.5 + records(3).numpy() / 8
    arrays = [noise[0], np.concatenate([noise[1], -noise[1]], axis=-1), noise[2]]
    image_processor = tiny_image_processor(backbone, representation)
    return image_processor([ECGRecord(array, 100, STANDARD_LEADS) for array in arrays], return_tensors="pt")


def ecg_inputs(model):
    """Three ECGs."""
    config = model.config
    if config.architecture == "text":
        return {}
    if config.representation == "signal":
        return {"ecg_values": records(3)}
    return dict(pictures(config.encoder_config.model_type, config.representation))


def of_ecgs(batch, ecgs):
    """The batch with other of its ECGs."""
    return {name: values[ecgs] if name in ECG_INPUTS else values for name, values in batch.items()}


def mixed_batch(model):
    """Samples with 2, 0 and 1 ECGs, padded on the left, as one batch and each alone."""
    ecg = [PLACEHOLDER] * model.config.num_ecg_tokens
    prompts = [[*ecg, 7, 8, 9, *ecg, 10], [11, 12], [13, *ecg, 14, 15, 16]]
    if model.config.architecture == "text":
        prompts = [[20, 7, 8, 9, 21, 10], [11, 12], [13, 14, 15, 16]]
    inputs = ecg_inputs(model)
    groups = [of_ecgs(inputs, [0, 1]), {}, of_ecgs(inputs, [2])]
    length = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    alone = [
        {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=int), **group}
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    return batch, alone


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def new_tokens(model, inputs, **kwargs):
    """So many tokens that follow each prompt, [sequences, NEW_TOKENS]."""
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)
    return output[:, -NEW_TOKENS:]


def train_step(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


class TestPairings:
    @pytest.mark.parametrize(("ecg_part", "changes", "family"), OF_FAMILIES)
    def test_forward_backward_save_and_load(self, ecg_part, changes, family, tmp_path):
        self.check(ecg_part, changes, family, tmp_path, UNUSED.get(ecg_part, ()))

    @pytest.mark.parametrize(
        ("ecg_part", "changes"), IMAGE_PAIRINGS + EMBEDDING_PAIRINGS, ids=ids(IMAGE_PAIRINGS + EMBEDDING_PAIRINGS)
    )
    def test_of_vision_backbones(self, ecg_part, changes, tmp_path):
        unused = (UNUSED_BY_EMBEDDING if "image_features" in changes else UNUSED).get(ecg_part, ())
        self.check(ecg_part, changes, "qwen2_5", tmp_path, unused)

    def check(self, ecg_part, changes, family, tmp_path, unused=()):
        model = tiny_elm(ecg_part, family, **changes)
        batch, _ = mixed_batch(model)
        expected = logits(model, **batch)
        assert expected.shape == (*batch["input_ids"].shape, 300)
        assert expected.isfinite().all()

        loss, gradients = train_step(model.train(), batch)
        assert loss.isfinite()
        untaught = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
        assert untaught == {name for name in gradients if any(part in name for part in unused)}

        model.eval().save_pretrained(tmp_path)  # the step moved the running statistics of batch norm
        loaded, info = ELMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(logits(loaded, **batch), logits(model, **batch))
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is (family != "llama3")

    @pytest.mark.parametrize(("ecg_part", "num_ecg_tokens"), [*((part, 4) for part in ECG_PARTS if part != "flat"), ("flat", 1), ("merl", 1), ("conv", 1)])  # fmt: skip
    def test_ecg_features(self, ecg_part, num_ecg_tokens):
        model = tiny_elm(ecg_part, num_ecg_tokens=num_ecg_tokens)
        features = model.get_ecg_features(records(3))
        assert features.shape == (3, num_ecg_tokens, 32)
        torch.testing.assert_close(features[1:2], model.get_ecg_features(records(3)[1:2]), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(features[0], features[1])

    def test_more_tokens_average_less_of_the_encoder(self):
        """The encoder's 26 tokens in two equal halves."""
        model = tiny_elm("mtae", connector="linear", num_ecg_tokens=2)
        tokens = model.model.encoder(records(2)).last_hidden_state
        expected = torch.stack([tokens[:, :13].mean(1), tokens[:, 13:].mean(1)], dim=1)
        torch.testing.assert_close(model.get_ecg_features(records(2)), model.model.connector(expected))


@pytest.mark.parametrize("kind", ["linear", "mlp", "flat", "patch", "conv"])
def test_golden_parity_of_connectors(kind, shared):
    golden = shared / "golden"
    shapes = json.loads((golden / "connector_state_dicts.json").read_text())[kind]
    encoders = load_file(golden / "encoders.safetensors")
    changes = {"connector": kind} if kind in ("linear", "mlp") else {"num_samples": 2500}
    changes |= {"num_ecg_tokens": {"flat": 1, "patch": 50, "conv": 50}.get(kind, 5)}
    config = tiny_elm_config("st_mem" if kind in ("linear", "mlp") else kind, **changes)
    config.text_config.hidden_size = 64
    if config.encoder_config is not None:
        config.encoder_config.hidden_size = 768
    connector = CONNECTOR_MODULES[kind](config)
    connector.load_state_dict(convert_state_dict(kind, golden_state_dict(shapes)), strict=True)
    with torch.no_grad():
        output = connector(encoders["st_mem.tokens5"] if config.encoder_config is not None else encoders["input"])
    expected = load_file(golden / "connectors.safetensors")[kind].reshape(output.shape)
    assert (output - expected).abs().max() <= 1e-4 * expected.abs().max()


class TestPlacement:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_features_stand_at_the_placeholders(self, family):
        model = tiny_elm("merl", family)
        batch, _ = mixed_batch(model)
        input_ids, ecg_values = batch.pop("input_ids"), batch.pop("ecg_values")
        expected = logits(model, input_ids=input_ids, ecg_values=ecg_values, **batch)
        embeddings = model.get_input_embeddings()(input_ids).detach()
        with pytest.raises(ValueError, match=r"embeddings do not tell where the ECGs stand\. Give input_ids"):
            model(inputs_embeds=embeddings, ecg_values=ecg_values, **batch)
        features = iter(model.get_ecg_features(ecg_values).detach().flatten(0, 1))
        by_hand = embeddings.clone()
        for row, column in (input_ids == PLACEHOLDER).nonzero().tolist():
            by_hand[row, column] = next(features)
        assert next(features, None) is None
        assert torch.equal(logits(model, inputs_embeds=by_hand, **batch), expected)
        assert not torch.allclose(logits(model, inputs_embeds=embeddings, **batch), expected)

    @pytest.mark.parametrize("ecg_part", [*ECG_PARTS, "vit", "siglip2_vision_model"])
    def test_order_of_the_ecgs(self, ecg_part):
        model = tiny_elm(ecg_part)
        batch, _ = mixed_batch(model)
        swapped = of_ecgs(batch, [1, 0, 2])
        difference = (logits(model, **batch) - logits(model, **swapped)).abs().amax((1, 2))
        assert difference[0] > 1e-3
        assert difference[1:].max() < 1e-5

    @pytest.mark.parametrize("num_ecgs", [2, 4])
    def test_as_many_ecgs_as_placeholders(self, num_ecgs):
        batch, _ = mixed_batch(model := tiny_elm())
        with pytest.raises(
            ValueError, match=rf"The text has 12 ECG placeholder tokens, but {num_ecgs} ECGs of 4 tokens"
        ):
            model(**batch | {"ecg_values": records(num_ecgs)})

    @pytest.mark.parametrize("ecg_part", ["merl", "patch", "vit", None])
    @pytest.mark.parametrize("training", [False, True])
    def test_a_placeholder_without_an_ecg(self, ecg_part, training):
        """Its embedding would be that of any other token."""
        model = tiny_elm(ecg_part, ecg_token_id=PLACEHOLDER).train(training)
        text = torch.tensor([[1, 2, 3], [4, PLACEHOLDER, PLACEHOLDER]])
        with pytest.raises(
            ValueError, match="The text has 2 ECG placeholder tokens, but 0 ECGs of 4 tokens each need 0"
        ):
            model(input_ids=text)
        model(input_ids=text[:1])
        with pytest.raises(ValueError, match="The text has 2 ECG placeholder tokens, but 0 ECGs"):
            model.generate(input_ids=text, max_new_tokens=1)

    def test_ids_or_embeddings(self):
        model = tiny_elm()
        input_ids = torch.tensor([[1, 2]])
        for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": model.get_input_embeddings()(input_ids)}):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                model(**inputs)

    @pytest.mark.parametrize("ecg_part", ECG_PARTS)
    @pytest.mark.parametrize("shape", [(1, 12, 400), (1, 12, 600), (1, 8, 500), (1, 500, 12), (12, 500)])
    def test_records_of_one_shape(self, ecg_part, shape):
        with pytest.raises(ValueError, match=r"this model reads \[ECGs, 12 leads, 500 samples\]"):
            tiny_elm(ecg_part).get_ecg_features(torch.zeros(shape))

    def test_text_only_reads_no_ecg(self):
        with pytest.raises(ValueError, match="text only"):
            tiny_elm(None)(input_ids=torch.tensor([[1, PLACEHOLDER]]), ecg_values=records(1))

    def test_more_tokens_than_the_encoder_makes(self):
        with pytest.raises(ValueError, match="num_ecg_tokens=14, but the encoder makes 13 tokens"):
            tiny_elm("mlae", num_ecg_tokens=14).get_ecg_features(records(1))

    def test_encoder_of_another_kind(self):
        config = tiny_elm_config("merl", encoder_config=BertConfig(), representation="rgb")
        with pytest.raises(ValueError, match="A 'bert' model reads no images; expected a vision backbone"):
            ELMForConditionalGeneration(config)

    @pytest.mark.parametrize(
        ("ecg_part", "of", "expected"),
        [
            ("merl", "vit", "reads 'signal' ECGs as ecg_values, which are not given"),
            ("vit", "merl", "reads 'rgb' ECGs as pixel_values, which are not given"),
        ],
    )
    def test_ecgs_of_another_representation(self, ecg_part, of, expected):
        model, other = tiny_elm(ecg_part), tiny_elm(of)
        batch, _ = mixed_batch(other)
        with pytest.raises(ValueError, match=f"This ELM {expected}. Prepare ECGs with the model's own processor"):
            model(**batch)


class TestGeneration:
    @pytest.mark.parametrize(
        ("ecg_part", "family", "modes"),
        [
            *(("merl", family, MODES) for family in FAMILIES),
            *((ecg_part, "llama3", ["greedy", "beams"]) for ecg_part in [*ECG_PARTS[1:], None]),
        ],
    )
    def test_a_batch_answers_as_its_samples_alone(self, ecg_part, family, modes):
        self.check(tiny_elm(ecg_part, family), modes)

    @pytest.mark.parametrize(
        ("ecg_part", "changes"),
        pairings := [*IMAGE_PAIRINGS, ("siglip2_vision_model", {"representation": "rgb", **EMBEDDING})],
        ids=ids(pairings),
    )
    def test_a_batch_of_pictures_too(self, ecg_part, changes):
        self.check(tiny_elm(ecg_part, **changes), ["greedy", "no cache", "beams, two answers"])

    def check(self, model, modes):
        batch, alone = mixed_batch(model)
        answers = {}
        for mode in modes:
            answers[mode] = new_tokens(model, batch, **MODES[mode])
            single = torch.cat([new_tokens(model, sample, **MODES[mode]) for sample in alone])
            assert torch.equal(answers[mode], single), mode
        assert all(torch.equal(answers["greedy"], answers[mode]) for mode in modes if "beams" not in mode)
        if model.config.architecture != "text":  # the comparison would see an ECG of the wrong sample
            other = new_tokens(model, of_ecgs(batch, [1, 2, 0]))
            assert (answers["greedy"] != other).any(1).tolist() == [True, False, True]

    @pytest.mark.parametrize("ecg_part", ["merl", "siglip2_vision_model"])
    def test_the_beams_of_a_sample_have_its_ecgs(self, ecg_part):
        """In its order: of two ECGs A and B, ABAB and not AABB."""
        model = tiny_elm(ecg_part)
        batch, _ = mixed_batch(model)
        input_ids, expanded = model._expand_inputs_for_generation(2, **batch)
        expected = logits(model, **batch).repeat_interleave(2, dim=0)
        torch.testing.assert_close(logits(model, input_ids=input_ids, **expanded), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}])
    def test_from_embeddings(self, kwargs):
        model = tiny_elm()
        batch, _ = mixed_batch(model)
        features = model.get_ecg_features(batch["ecg_values"])
        embeddings = model.model.embed(batch["input_ids"])
        mask = (batch["input_ids"] == PLACEHOLDER).unsqueeze(-1)
        prompt = {"inputs_embeds": embeddings.masked_scatter(mask, features), "attention_mask": batch["attention_mask"]}
        assert torch.equal(new_tokens(model, prompt, **kwargs), new_tokens(model, batch))
        assert torch.equal(new_tokens(model, prompt, num_beams=3, **kwargs), new_tokens(model, batch, num_beams=3))
        ecgs = {"ecg_values": batch["ecg_values"]}
        with pytest.raises(ValueError, match="embeddings do not tell where the ECGs stand"):
            new_tokens(model, prompt | ecgs, **kwargs)
        with pytest.raises(ValueError, match="Beams and several sequences need input_ids beside the ECGs"):
            new_tokens(model, prompt | ecgs, num_beams=3)

    @pytest.mark.parametrize(
        "kwargs", [{}, {"num_beams": 2}, {"do_sample": True}, {"generation_config": GenerationConfig(max_new_tokens=5)}]
    )
    def test_the_placeholder_is_never_written(self, kwargs, tmp_path):
        model = tiny_elm()
        batch, _ = mixed_batch(model)
        model.save_pretrained(tmp_path)
        for elm in (model, ELMForConditionalGeneration.from_pretrained(tmp_path)):
            prefer_placeholder = nn.functional.one_hot(torch.tensor(PLACEHOLDER), 300) * 1e4
            elm.lm_head.register_forward_hook(lambda module, args, output, bonus=prefer_placeholder: output + bonus)
            assert (logits(elm, **batch)[:, -1].argmax(-1) == PLACEHOLDER).all()
            output = elm.generate(**batch, **{"max_new_tokens": 5} | kwargs)
            assert not (output[:, batch["input_ids"].shape[1] :] == PLACEHOLDER).any()

    def draft(self, model, kind):
        """A draft model: the language model of the ELM by itself, the ELM, or one that always drafts the placeholder."""
        if kind == "elm":
            return model
        torch.manual_seed(1)
        draft = AutoModelForCausalLM.from_config(model.config.text_config).eval()
        if kind == "language model":
            draft.model, draft.lm_head = model.model.language_model, model.lm_head
        else:
            prefer_placeholder = nn.functional.one_hot(torch.tensor(PLACEHOLDER), 300) * 1e4
            draft.lm_head.register_forward_hook(lambda module, args, output: output + prefer_placeholder)
        return draft

    @pytest.mark.parametrize("ecg_part", ["merl", "vit"])
    @pytest.mark.parametrize("kind", ["elm", "language model", "placeholders"])
    def test_a_draft_model_changes_no_token(self, ecg_part, kind):
        model = tiny_elm(ecg_part)
        _, alone = mixed_batch(model)
        draft = self.draft(model, kind)
        with torch.no_grad():
            for sample in alone:
                calls = []
                handle = model.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
                expected = new_tokens(model, sample)
                handle.remove()
                steps = []
                handle = model.model.register_forward_hook(lambda *_, steps=steps: steps.append(1))
                assert torch.equal(new_tokens(model, sample, assistant_model=draft), expected)
                handle.remove()
                assert kind == "elm" or len(steps) <= len(calls)
            if kind == "elm":  # which sees the ECGs, so all that it drafts is right
                draft.generation_config.num_assistant_tokens = 20
                sequences = model.generate(
                    **alone[0], max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft
                )
                assert torch.equal(sequences[:, -NEW_TOKENS:], new_tokens(model, alone[0]))

    def test_a_draft_model_with_a_vocabulary_of_its_own(self):
        """Without the ECG's placeholder, as that of a language model that is not an ELM."""
        tokenizer, of_draft = tiny_processor().tokenizer, tiny_tokenizer()
        model = tiny_elm(ecg_token_id=tokenizer.convert_tokens_to_ids("<signal>"))
        draft = AutoModelForCausalLM.from_config(tiny_llm_config(vocab_size=len(of_draft))).eval()
        ids = torch.tensor(
            [[model.config.ecg_token_id] * 4 + tokenizer.encode("What is it?", add_special_tokens=False)]
        )
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "ecg_values": records(1)}
        tokenizers = {"tokenizer": tokenizer, "assistant_tokenizer": of_draft}
        assert torch.equal(new_tokens(model, sample, assistant_model=draft, **tokenizers), new_tokens(model, sample))

    @pytest.mark.parametrize("ecg_part", ["merl", "siglip2_vision_model"])
    def test_prompt_lookup_changes_no_token(self, ecg_part):
        """Though what follows the same words in the prompt are placeholders."""
        model = tiny_elm(ecg_part)
        ids = torch.tensor([[9, 10, *[PLACEHOLDER] * 4, 7, 8, 9, 10]])
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **of_ecgs(ecg_inputs(model), [0])}
        assert torch.equal(new_tokens(model, sample, prompt_lookup_num_tokens=5), new_tokens(model, sample))

    @pytest.mark.parametrize("ecg_part", ["merl", "patch", "vit", "siglip2_vision_model"])
    @pytest.mark.parametrize("size", [3, 100])
    def test_a_prompt_in_chunks(self, ecg_part, size):
        """Which cut ECGs in two."""
        model = tiny_elm(ecg_part)
        batch, _ = mixed_batch(model)
        runs = []
        model.model.connector.register_forward_hook(lambda *_: runs.append(1))
        for kwargs in ({}, {"num_beams": 3}):
            expected = new_tokens(model, batch, **kwargs)
            runs.clear()
            assert torch.equal(new_tokens(model, batch, prefill_chunk_size=size, **kwargs), expected)
            assert runs == [1]

    def test_other_suppressed_tokens_stay(self, tmp_path):
        save_tiny_llm(tmp_path)
        GenerationConfig(suppress_tokens=[3]).save_pretrained(tmp_path)
        model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
            tmp_path, architecture="fuyu", connector="flat", ecg_token_id=7
        )
        assert model.generation_config.suppress_tokens == [3, 7]


class TestMissingLeads:
    @pytest.mark.parametrize("ecg_part", ["merl", "st_mem", "patch"])
    def test_mask(self, ecg_part):
        """It goes with its ECG, in a batch, in beams and without a cache; what stands in place of missing leads is not read."""
        model = tiny_elm(ecg_part)
        batch, alone = mixed_batch(model)
        mask = torch.ones(3, 12, dtype=torch.bool)
        assert torch.equal(logits(model, **batch, ecg_lead_mask=mask), logits(model, **batch))
        mask[1, 2:] = mask[2, :7] = False
        expected = logits(model, **batch, ecg_lead_mask=mask)
        assert ((expected - logits(model, **batch)).abs().amax((1, 2)) > 1e-3).tolist() == [True, False, True]
        masked = batch | {
            "ecg_lead_mask": mask,
            "ecg_values": batch["ecg_values"].masked_fill(~mask[..., None], torch.nan),
        }
        assert torch.equal(logits(model, **masked), expected)
        groups = [{"ecg_lead_mask": mask[:2]}, {}, {"ecg_lead_mask": mask[2:]}]
        for mode in ("greedy", "no cache", "beams, two answers"):
            single = [new_tokens(model, one | own, **MODES[mode]) for one, own in zip(alone, groups, strict=True)]
            assert torch.equal(new_tokens(model, masked, **MODES[mode]), torch.cat(single)), mode


class TestNumerics:
    @pytest.mark.parametrize(
        "config",
        [
            *(tiny_elm_config(ecg_part, "gemma2") for ecg_part in ("merl", "st_mem", "conv")),
            *(tiny_image_elm_config(backbone, family="gemma2") for backbone in ("siglip2_vision_model", "vit")),
        ],
        ids=["merl", "st_mem", "conv", "siglip2_vision_model", "vit"],
    )
    def test_bfloat16(self, config, tmp_path):
        torch.manual_seed(0)
        model = ELMForConditionalGeneration(config).eval()
        batch, _ = mixed_batch(model)
        model.save_pretrained(tmp_path)
        loaded = ELMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        output = logits(loaded, **batch)
        assert output.dtype == torch.bfloat16
        similarity = nn.functional.cosine_similarity(output.float(), logits(model, **batch), dim=-1)
        assert similarity[batch["attention_mask"].bool()].min() > 0.99
        assert new_tokens(loaded, batch).shape == (3, NEW_TOKENS)

    @pytest.mark.parametrize(("family", "llm_calls"), [("llama3", 2), ("gemma2", 0)])
    def test_sdpa_is_used_and_equals_eager(self, family, llm_calls, monkeypatch, tmp_path):
        """By the encoder's layer and the language model's two; the soft cap of Gemma 2 needs eager."""
        model = tiny_elm("st_mem", family)
        batch, _ = mixed_batch(model)
        model.save_pretrained(tmp_path)
        eager = ELMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
        calls = []
        sdpa = nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or sdpa(*args, **kwargs))  # fmt: skip
        expected = logits(eager, **batch)
        assert calls == []
        output = logits(model, **batch)
        assert len(calls) == 1 + llm_calls
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(output[mask], expected[mask], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("ecg_part", "module"),
        [
            ("merl", "stages.0.0.convs.0"),
            ("st_mem", "layers.0.mlp"),
            ("clip_vision_model", "encoder.layers.0.mlp"),
            ("siglip2_vision_model", "encoder.layers.0.mlp"),
            ("vit", "layers.0.mlp"),
        ],
    )
    def test_gradient_checkpointing(self, ecg_part, module):
        """Of the language model and of the encoder: each layer runs once more in the backward pass."""
        model = tiny_elm(ecg_part).train()
        batch, _ = mixed_batch(model)
        runs = []
        for layer in (model.model.language_model.layers[0].mlp, model.model.encoder.get_submodule(module)):
            layer.register_forward_pre_hook(lambda module, args: runs.append(type(module)))
        loss, gradients = train_step(model, batch)
        once = runs.copy()
        model.zero_grad()
        model.gradient_checkpointing_enable()
        checkpointed_loss, checkpointed = train_step(model, batch)
        assert Counter(runs) == Counter(once * 3)
        torch.testing.assert_close(checkpointed_loss, loss)
        torch.testing.assert_close(checkpointed, gradients)

    @pytest.mark.minutes
    @pytest.mark.slow
    def test_compiled_training_step(self):
        model = tiny_elm("st_mem").train()
        batch, _ = mixed_batch(model)
        loss, gradients = train_step(model, batch)
        model.zero_grad()
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        compiled_loss = torch.compile(model, backend="aot_eager")(**batch, labels=labels).loss
        compiled_loss.backward()
        torch.testing.assert_close(compiled_loss.detach(), loss)
        torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, gradients)

    @pytest.mark.minutes
    @pytest.mark.slow
    def test_compiled_as_one_graph(self):
        """Which checks the number of placeholders too."""
        model = tiny_elm()
        batch, _ = mixed_batch(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, logits(model, **batch))
            with pytest.raises(RuntimeError, match="placeholder tokens of the text are not as many as the ECGs need"):
                compiled(**batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 7, PLACEHOLDER)})

    def test_a_loss_over_accumulated_batches(self):
        """The trainer gives the number of labels of all its micro batches."""
        model = tiny_elm()
        batch, _ = mixed_batch(model)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        mean = model(**batch, labels=labels).loss
        number = (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(model(**batch, labels=labels, num_items_in_batch=2 * number).loss, mean / 2)

    def test_logits_to_keep(self):
        model = tiny_elm(family="gemma2")
        batch, _ = mixed_batch(model)
        torch.testing.assert_close(logits(model, **batch, logits_to_keep=1), logits(model, **batch)[:, -1:])

    @pytest.mark.parametrize("ecg_part", ["merl", "st_mem", "vit", "resnet"])
    def test_a_frozen_encoder_stays_in_eval_mode(self, ecg_part):
        model = tiny_elm(ecg_part)
        batch, _ = mixed_batch(model)
        model.model.encoder.requires_grad_(False)
        model.train()
        assert not any(module.training for module in model.model.encoder.modules())
        assert model.model.language_model.training
        assert model.model.connector.training
        state = {key: value.clone() for key, value in model.model.encoder.state_dict().items()}
        model(**batch)
        torch.testing.assert_close(dict(model.model.encoder.state_dict()), state, rtol=0, atol=0)
        model.model.encoder.requires_grad_(True)
        assert all(module.training for module in model.train().modules())


class TestDevicesAndVocabulary:
    @pytest.mark.parametrize("ecg_part", [*ECG_PARTS, None])
    def test_on_the_meta_device(self, ecg_part):
        with torch.device("meta"):
            model = ELMForConditionalGeneration(tiny_elm_config(ecg_part))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

    @pytest.mark.parametrize("family", ["llama3", "qwen2_5"])
    @pytest.mark.parametrize(
        "device_map",
        ["auto", {"": "cpu"}, {"model.encoder": "cpu", "model.connector": "cpu", "model.language_model": "disk", "lm_head": "cpu"}],
        ids=["auto", "cpu", "disk"],
    )  # fmt: skip
    def test_device_map(self, device_map, family, tmp_path):
        if family == "qwen2_5" and isinstance(device_map, dict) and len(device_map) > 1:
            device_map = device_map | {"lm_head": "disk"}  # tied to the embeddings
        model = tiny_elm("merl", family)
        batch, _ = mixed_batch(model)
        model.save_pretrained(tmp_path / "model")
        loaded = ELMForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        torch.testing.assert_close(logits(loaded, **batch), logits(model, **batch))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_resize_token_embeddings(self, family, tmp_path):
        model = tiny_elm("merl", family)
        batch, _ = mixed_batch(model)
        expected = logits(model, **batch)
        model.resize_token_embeddings(310)
        assert model.config.text_config.vocab_size == 310
        assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (310, 32)
        torch.testing.assert_close(logits(model, **batch)[..., :300], expected)
        assert train_step(model.train(), batch)[0].isfinite()
        model.save_pretrained(tmp_path)
        loaded = ELMForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, **batch), logits(model, **batch))
        for elm in (model, loaded):
            assert (elm.lm_head.weight is elm.get_input_embeddings().weight) is (family != "llama3")


class TestFromPretrainedParts:
    def build(self, llm, **kwargs):
        config = ENCODER_CONFIGS["merl"](num_samples=500, **TINY_ENCODERS["merl"])
        parts = {} if "encoder" in kwargs else {"encoder_config": config}
        return ELMForConditionalGeneration.from_encoder_llm_pretrained(
            llm, **{"num_ecg_tokens": 4, "ecg_token_id": 5, **parts, **kwargs}
        )

    def check_text_is_the_llms(self, model, llm, folder):
        """Of the new ELM and of the saved and loaded one."""
        input_ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
        expected = logits(llm, input_ids=input_ids)
        assert torch.equal(logits(model, input_ids=input_ids), expected)
        model.save_pretrained(folder)
        loaded, info = ELMForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, attn_implementation={"text_config": llm.config._attn_implementation}
        )
        assert not any(info.values())
        assert torch.equal(logits(loaded, input_ids=input_ids), expected)
        for elm in (model, loaded):
            tied = elm.lm_head.weight is elm.get_input_embeddings().weight
            assert tied is llm.config.tie_word_embeddings

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_language_model(self, family, dtype, tmp_path):
        folder = save_tiny_llm(tmp_path / "llm", family)
        model = self.build(folder, llm_kwargs={"dtype": dtype})
        assert {parameter.dtype for parameter in model.model.language_model.parameters()} == {dtype}
        # the encoder is trained yet
        assert {parameter.dtype for parameter in model.model.encoder.parameters()} == {torch.float32}
        assert model.dtype == dtype
        self.check_text_is_the_llms(model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tmp_path / "elm")
        assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_implementation(self, implementation, tmp_path):
        folder = save_tiny_llm(tmp_path / "llm")
        model = self.build(folder, llm_kwargs={"attn_implementation": implementation})
        assert model.model.language_model.config._attn_implementation == implementation
        assert model.config.text_config._attn_implementation == implementation

    @pytest.mark.parametrize(
        "config",
        [
            GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64),
            OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32),
        ],
        ids=["gpt2", "opt"],
    )  # fmt: skip
    def test_embeddings_of_another_name(self, config, tmp_path):
        """Tied, but not called embed_tokens."""
        llm = AutoModelForCausalLM.from_config(config).eval()
        llm.save_pretrained(tmp_path / "llm")
        self.check_text_is_the_llms(self.build(tmp_path / "llm"), llm, tmp_path / "elm")

    @pytest.mark.parametrize("kind", TINY_ENCODERS)
    def test_pretrained_encoder(self, kind, tmp_path):
        torch.manual_seed(1)
        encoder = ENCODER_MODELS[kind](ENCODER_CONFIGS[kind](num_samples=500, **TINY_ENCODERS[kind])).eval()
        encoder.save_pretrained(tmp_path / "encoder")
        model = self.build(save_tiny_llm(tmp_path / "llm"), encoder=tmp_path / "encoder")
        assert model.config.encoder_config.model_type == kind
        model.save_pretrained(tmp_path / "elm")
        loaded = ELMForConditionalGeneration.from_pretrained(tmp_path / "elm")
        for elm in (model, loaded):
            output = elm.model.encoder(records(2)).last_hidden_state
            torch.testing.assert_close(output, encoder(records(2)).last_hidden_state)

    def test_encoder_that_is_none(self, tmp_path):
        folder = save_tiny_llm(tmp_path)
        with pytest.raises(ValueError, match="A 'llama' model reads no images; expected a vision backbone"):
            self.build(folder, encoder=folder)

    def test_without_an_encoder(self, tmp_path):
        with pytest.raises(StrictDataclassError, match="'llava' needs an encoder_config"):
            self.build(save_tiny_llm(tmp_path), encoder_config=None)

    SIZES = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (BertConfig(**SIZES, is_decoder=True), r"BertLMHeadModel \(bert\) does more than its embeddings, its layers and"),
            (OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=16), r"The head of OPTForCausalLM \(opt\) is Linear\(in_features=16.* the 32 numbers"),
            (MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1), r"MambaForCausalLM \(mamba\) keeps what it has read in a cache of its own"),
            (ViTConfig(), "holds a 'vit' model, which writes no text; expected a causal LLM"),
        ],
        ids=["transform", "width", "cache", "no text"],
    )  # fmt: skip
    def test_language_model_that_does_not_fit(self, config, message, tmp_path):
        if config.model_type == "vit":
            config.save_pretrained(tmp_path)
        else:
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            self.build(tmp_path)


def test_fresh_processes_without_the_project(tmp_path):
    """One loads what we saved, answers and saves it again; another loads that, as another Auto class."""
    model = tiny_elm("st_mem", "qwen2_5")
    batch, _ = mixed_batch(model)
    folders = [tmp_path / name for name in ("first", "second", "third")]
    model.save_pretrained(folders[0])
    save_file(batch, tmp_path / "batch.safetensors")
    expected, tokens = logits(model, **batch), new_tokens(model, batch)
    auto_classes = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    for auto_class, (source, target) in zip(auto_classes, itertools.pairwise(folders), strict=True):
        run_isolated(
            "import torch, transformers\n"
            "from safetensors.torch import load_file, save_file\n"
            f"model = transformers.{auto_class}.from_pretrained({str(source)!r}, trust_remote_code=True)\n"
            "batch = load_file('batch.safetensors')\n"
            "with torch.no_grad():\n"
            "    logits = model(**batch).logits\n"
            f"answer = model.generate(**batch, max_new_tokens={NEW_TOKENS}, min_new_tokens={NEW_TOKENS}, do_sample=False)[:, -{NEW_TOKENS}:]\n"
            "save_file({'logits': logits, 'answer': answer.contiguous()}, 'output.safetensors')\n"
            f"model.save_pretrained({str(target)!r})\n",
            tmp_path,
        )
        output = load_file(tmp_path / "output.safetensors")
        torch.testing.assert_close(output["logits"], expected, rtol=0, atol=1e-6)
        assert torch.equal(output["answer"], tokens)
        names = {path.name for path in target.iterdir()}
        assert names == {path.name for path in folders[0].iterdir()}
        assert names >= {"configuration_elm.py", "modeling_elm.py", "modeling_ecg_encoders.py", "model.safetensors"}
        assert {path.suffix for path in target.iterdir()} == {".json", ".py", ".safetensors"}


@pytest.mark.parametrize("ecg_part", ["st_mem", "siglip2_vision_model", "vit"])
def test_a_real_record(ecg_part, shared):
    """PTB-XL record 1 through the processor into an ELM."""
    counts = np.load(shared / "data/ptbxl/raw500.npz")["ecg"][0]
    if ecg_part in TINY_VISION:
        processor = tiny_image_processor_elm(ecg_part, truncation="center")
    else:
        processor = tiny_processor(truncation="center", normalization="zscore")
    model = tiny_elm(ecg_part, ecg_token_id=processor.ecg_token_id)
    part = {"type": "ecg", "ecg": counts, "sampling_rate": 500, "unit": "uV"}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What is the rhythm?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    name = "pixel_values" if ecg_part in TINY_VISION else "ecg_values"
    assert len(inputs[name]) == 1
    assert len(processor.batch_decode(new_tokens(model, inputs))) == 1
    flat = inputs | {name: torch.zeros_like(inputs[name])}
    assert not torch.allclose(logits(model, **inputs), logits(model, **flat), atol=1e-3)


@pytest.mark.parametrize(
    ("ecg_part", "changes"),
    pairings := [("merl", {}), *((backbone, {}) for backbone in TINY_VISION), *EMBEDDING_PAIRINGS[:3]],
    ids=ids(pairings),
)
def test_a_training_batch_without_ecg_teaches_the_language_model_alone(ecg_part, changes):
    """All that a batch with ECGs reaches gets a gradient, of zeros but for the language model, and batch norm learns nothing."""
    model = tiny_elm(ecg_part, **changes).train()
    batch, _ = mixed_batch(model)
    reached = {name for name, gradient in train_step(model, batch)[1].items() if gradient is not None}
    model.zero_grad()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    text = {"input_ids": torch.arange(10, 18)[None], "attention_mask": torch.ones(1, 8, dtype=int)}
    loss, gradients = train_step(model, text)
    assert {name for name, gradient in gradients.items() if gradient is not None} == reached
    learnt = {name for name in reached if gradients[name].any()}
    assert learnt == {name for name in reached if name.startswith(("model.language_model.", "lm_head."))}
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.model.encoder.training
    hidden = model.model.language_model(**text).last_hidden_state
    labels = text["input_ids"][:, 1:].flatten()
    assert torch.equal(nn.functional.cross_entropy(model.lm_head(hidden)[:, :-1].flatten(0, 1), labels), loss)


@pytest.mark.parametrize("ecg_part", ["merl", "vit"])
def test_a_frozen_encoder_does_not_run_without_ecg(ecg_part, monkeypatch):
    """The connector does while it is trained; of an encoder in shards each process has to take part."""
    model = tiny_elm(ecg_part).train()
    elm, ran = model.model, []
    for name in ("encoder", "connector"):
        getattr(elm, name).register_forward_hook(lambda *args, name=name: ran.append(name))
    text = {"input_ids": torch.arange(10, 18)[None], "attention_mask": torch.ones(1, 8, dtype=int)}
    elm.encoder.requires_grad_(False)
    _, gradients = train_step(model, text)
    assert ran == ["connector"]
    of_connector = {name: gradient for name, gradient in gradients.items() if name.startswith("model.connector.")}
    assert of_connector
    assert not any(gradient is None or gradient.any() for gradient in of_connector.values())
    elm.connector.requires_grad_(False)
    train_step(model, text)
    assert ran == ["connector"]
    with torch.no_grad():
        model.eval()(**text)
    assert ran == ["connector"]
    monkeypatch.setattr(modeling_elm, "is_deepspeed_zero3_enabled", lambda: True)
    train_step(model.train(), text)
    assert ran == ["connector", "encoder", "connector"]
