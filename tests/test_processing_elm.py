import json
from copy import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel

from elm_ecg.ecg_drawing import ECGPaper, draw_ecg
from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord, as_record, resample
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.symbolic_elm import DISPENSABLE_LEADS
from elm_ecg.training.data.synthetic import make_record
from helpers import (
    run_isolated,
    tiny_ecg_byte,
    tiny_image_processor,
    tiny_image_processor_elm,
    tiny_processor,
    tiny_symbolic_processor,
    tiny_tokenizer,
)

NUM_ECG_TOKENS = 4


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("llama3", NUM_ECG_TOKENS)


def ecg(seed=0):
    """[12, 500] millivolts, 2 s at 250 Hz: what the model takes."""
    return np.random.default_rng(seed).normal(size=(12, 500)).astype(np.float32)


def ecg_part(seed=0, **changes):
    return {"type": "ecg", "ecg": ecg(seed), "sampling_rate": 250} | changes


def chat(*contents):
    """Turns of user and assistant, each a list of parts in which a string is a text."""
    roles = ["user", "assistant"] * len(contents)
    parts = [[{"type": "text", "text": part} if isinstance(part, str) else part for part in c] for c in contents]
    return [{"role": role, "content": content} for role, content in zip(roles, parts, strict=False)]


def simulated_leads(lead_names):
    """[leads, 500] millivolts, 5 s at 100 Hz."""
    array = make_record(0, 0, sampling_rate=100, seconds=5.0)["ecg"]["array"]
    return array[[STANDARD_LEADS.index(lead) for lead in lead_names]] / np.float32(1e3)


def inputs_of(processor, chats, **kwargs):
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs or None
    )


def values_of(batch):
    return [values.numpy() for values in batch["ecg_values"]]


class TestCall:
    @pytest.mark.parametrize("text", ["Hello", ["Hello"]])
    def test_text_only(self, text, processor):
        inputs = processor(text=text, return_tensors="pt")
        assert inputs.keys() == {"input_ids", "attention_mask"}
        assert processor.batch_decode(inputs["input_ids"]) == ["Hello"]

    @pytest.mark.parametrize("ecgs", [ecg(), [ecg()], torch.tensor(ecg()), ecg()[None]], ids=["one", "list", "tensor", "batch"])  # fmt: skip
    def test_ecgs_only(self, ecgs, processor):
        inputs = processor(ecgs=ecgs, sampling_rate=250, return_tensors="pt")
        assert inputs.keys() == {"ecg_values"}
        assert inputs["ecg_values"].dtype == torch.float32
        np.testing.assert_array_equal(inputs["ecg_values"], ecg()[None])

    @pytest.mark.parametrize("as_list", [False, True])
    def test_text_and_ecg(self, as_list, processor):
        text, ecgs = "<signal>\nWhat?", ecg()
        inputs = processor(text=[text] if as_list else text, ecgs=[ecgs] if as_list else ecgs, sampling_rate=250)
        assert processor.batch_decode(inputs["input_ids"]) == ["<signal>" * NUM_ECG_TOKENS + "\nWhat?"]
        assert inputs["input_ids"][0][:5] == [processor.ecg_token_id] * NUM_ECG_TOKENS + inputs["input_ids"][0][4:5]
        np.testing.assert_array_equal(inputs["ecg_values"], ecg()[None])

    def test_what_is_said_of_the_ecgs_goes_to_the_feature_extractor(self, processor):
        leads = list(reversed(STANDARD_LEADS))
        microvolts = 1000 * np.repeat(ecg(), 2, axis=1)
        inputs = processor(ecgs=microvolts, sampling_rate=500, lead_names=leads, unit="uV", return_tensors="pt")
        expected = processor.feature_extractor(
            {"array": microvolts, "sampling_rate": 500, "lead_names": leads, "unit": "uV"}
        )
        np.testing.assert_array_equal(inputs["ecg_values"], expected["ecg_values"])

    def test_nothing(self, processor):
        with pytest.raises(ValueError, match="There is no text; give at least one"):
            processor(text=[])
        with pytest.raises(ValueError, match="There is no chat, or no message in it; give at least one"):
            processor.apply_chat_template([], tokenize=True)
        with pytest.raises(ValueError, match="Give text, ecgs or both"):
            processor()

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side, processor):
        texts = ["short", "<signal> and <signal>", "<signal>"]
        inputs = processor(text=texts, ecgs=[ecg()] * 3, sampling_rate=250, padding_side=side, return_tensors="pt")
        alone = [
            processor(text=text, ecgs=[ecg()] * text.count("<signal>") or None, sampling_rate=250) for text in texts
        ]
        for ids, mask, single in zip(inputs["input_ids"], inputs["attention_mask"], alone, strict=True):
            expected = single["input_ids"][0]
            padding = [0] * (len(mask) - len(expected))
            assert ids[mask.bool()].tolist() == expected
            ones = [1] * len(expected)
            assert mask.tolist() == (padding + ones if side == "left" else ones + padding)

    def test_padding_can_be_turned_off(self, processor):
        assert [len(ids) for ids in processor(text=["a", "abc"], padding=False)["input_ids"]] == [1, 3]

    @pytest.mark.parametrize(
        ("text", "ecgs", "message"),
        [
            ("no placeholder", [ecg()], r"The text has 0 <signal> placeholders \(\[0\] by sample\) for 1 ECGs"),
            ("<signal>", None, r"The text has 1 <signal> placeholders \(\[1\] by sample\) for 0 ECGs"),
            (["<signal>", "<signal><signal>"], [ecg()] * 2, r"has 3 <signal> placeholders \(\[1, 2\] by sample\) for 2 ECGs"),
        ],
    )  # fmt: skip
    def test_placeholders_and_ecgs_of_different_number(self, text, ecgs, message, processor):
        with pytest.raises(ValueError, match=message):
            processor(text=text, ecgs=ecgs, sampling_rate=250)

    def test_missing_sampling_rate(self, processor):
        with pytest.raises(ValueError, match="no sampling rate"):
            processor(text="<signal>", ecgs=ecg())

    @pytest.mark.parametrize(
        "form",
        [
            lambda array: array,
            lambda array: array.tolist(),
            lambda array: {"array": array.repeat(2, axis=1), "sampling_rate": 500},
            lambda array: ECGRecord(array, 250, STANDARD_LEADS),
            torch.tensor,
        ],
        ids=["array", "nested lists", "dict with its own rate", "record", "tensor"],
    )
    def test_a_group_of_ecgs_for_each_text(self, form, processor):
        one, two, three = (form(ecg(seed)) for seed in range(3))
        rate = None if isinstance(one, dict) else 250  # it has its own
        texts = ["<signal> A", "B", "<signal> C <signal>"]
        flat = processor(text=texts, ecgs=[one, two, three], sampling_rate=rate)
        stacked = form is torch.tensor
        for groups in ([[one], [], [two, three]], ([one], (), torch.stack([two, three]) if stacked else (two, three))):
            inputs = processor(text=texts, ecgs=groups, sampling_rate=rate)
            assert inputs["input_ids"] == flat["input_ids"]
            np.testing.assert_array_equal(inputs["ecg_values"], flat["ecg_values"])
        first_empty = processor(text=["B", "<signal>"], ecgs=[[], [one]], sampling_rate=rate)
        np.testing.assert_array_equal(first_empty["ecg_values"], flat["ecg_values"][:1])
        with pytest.raises(
            ValueError, match=r"texts have \[1, 0, 2\] .* groups of ECGs \[1, 1, 1\] ECGs; give each text"
        ):
            processor(text=texts, ecgs=[[one], [two], [three]], sampling_rate=rate)

    @pytest.mark.parametrize("ecgs", [[], [[], []], [(), ()]])
    def test_groups_without_an_ecg(self, ecgs, processor):
        assert processor(text=["A", "B"], ecgs=ecgs) == processor(text=["A", "B"])
        with pytest.raises(ValueError, match="There is no ECG"):
            processor(ecgs=ecgs)

    def test_groups_without_text(self, processor):
        inputs = processor(ecgs=[[ecg(0)], [ecg(1), ecg(2)]], sampling_rate=250)
        np.testing.assert_array_equal(inputs["ecg_values"], [ecg(0), ecg(1), ecg(2)])
        with pytest.raises(ValueError, match="The ECGs are in groups; give them in one list, or the processor"):
            processor.feature_extractor([[ecg(0)], [], [ecg(1), ecg(2)]], sampling_rate=250)


class TestChat:
    @pytest.mark.parametrize(
        "part",
        [
            {"ecg": ecg(), "sampling_rate": 250},
            {"ecg": torch.tensor(ecg()), "sampling_rate": 250, "unit": None},
            {"ecg": ecg().tolist(), "sampling_rate": 250},
            {"ecg": 1000 * ecg(), "sampling_rate": 250, "unit": "uV"},
            {"ecg": ecg()[::-1], "sampling_rate": 250, "lead_names": STANDARD_LEADS[::-1]},
            {"ecg": {"array": ecg(), "sampling_rate": 250}},
            {"ecg": {"array": 1000 * ecg(), "sampling_rate": 250}, "unit": "uV"},
            {"ecg": as_record(ecg(), 250)},
            {"ecg": None, "path": "said.npz"},
            {"path": "said.npz"},
            {"path": "said.npz", "sampling_rate": 250},
            {"path": "array.npy", "sampling_rate": 250},
        ],
    )
    def test_forms_of_an_ecg(self, part, processor, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        np.savez("said.npz", array=ecg(), sampling_rate=250)
        np.save("array.npy", ecg())
        inputs = inputs_of(processor, chat([{"type": "ecg", **part}, "What?"]))
        np.testing.assert_allclose(values_of(inputs), [ecg()], rtol=1e-6)
        assert (inputs["input_ids"] == processor.ecg_token_id).sum() == NUM_ECG_TOKENS

    def test_a_contradiction(self, processor):
        part = {"type": "ecg", "ecg": {"array": ecg(), "sampling_rate": 500}, "sampling_rate": 250}
        with pytest.raises(ValueError, match="states its sampling_rate, 500, and 250 is given too"):
            inputs_of(processor, chat([part]))

    def test_ecgs_beside_the_chat(self, processor):
        contents = [[{"type": "ecg"}, "a", {"type": "ecg"}], ["yes"], [{"type": "ecg"}]]
        inside = [[ecg_part(0), "a", ecg_part(1)], ["yes"], [ecg_part(2)]]
        expected = inputs_of(processor, chat(*inside))
        inputs = inputs_of(processor, chat(*contents), ecgs=[ecg(seed) for seed in range(3)], sampling_rate=250)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        np.testing.assert_array_equal(inputs["ecg_values"], expected["ecg_values"])
        np.testing.assert_array_equal(values_of(inputs), [ecg(seed) for seed in range(3)])

    def test_several_ecgs_in_several_turns(self, processor):
        inputs = inputs_of(processor, chat([ecg_part(3), "a"], ["b"], ["c", ecg_part(1), ecg_part(2)]))
        np.testing.assert_array_equal(values_of(inputs), [ecg(3), ecg(1), ecg(2)])
        run = "<signal>" * NUM_ECG_TOKENS
        text = processor.batch_decode(inputs["input_ids"])[0]
        assert text.split("<|end_header_id|>\n\n")[1:] == [
            f"{run}\na<|eot_id|><|start_header_id|>assistant",
            "b<|eot_id|><|start_header_id|>user",
            f"c{run}\n{run}<|eot_id|>",  # the template takes white space at the ends away
        ]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_batch_is_its_chats_alone(self, side, processor):
        chats = [
            chat([ecg_part(0), "Compare with", ecg_part(1), "in many words, please."]),
            chat(["No ECG here."]),
            chat([ecg_part(2), "Q"], ["A"], ["Why?"]),
        ]
        batch = inputs_of(processor, chats, padding_side=side)
        np.testing.assert_array_equal(values_of(batch), [ecg(0), ecg(1), ecg(2)])
        for messages, ids, mask, number in zip(
            chats, batch["input_ids"], batch["attention_mask"], [2, 0, 1], strict=True
        ):
            alone = inputs_of(processor, messages)
            assert torch.equal(ids[mask.bool()], alone["input_ids"][0])
            assert (ids == processor.ecg_token_id).sum() == number * NUM_ECG_TOKENS
            assert ("ecg_values" in alone) is (number > 0)

    def test_no_second_bos(self, processor):
        ids = inputs_of(processor, chat(["Q"]))["input_ids"][0].tolist()
        assert ids.count(processor.tokenizer.bos_token_id) == 1

    def test_control_tokens_of_the_user_as_text(self, processor):
        """transformers' `sanitize_control_tokens`: what a user writes cannot end their turn."""
        arguments = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
        ids = processor.apply_chat_template(chat([ecg_part(), "a<|eot_id|>b"]), **arguments)["input_ids"][0]
        assert ids.count(processor.tokenizer.eos_token_id) == 1
        assert "a<|eot_id|>b" in processor.decode(ids)

    @pytest.mark.parametrize("text", ["<signal>", "What is <signal>?"])
    @pytest.mark.parametrize("with_ecg", [False, True])
    def test_a_literal_placeholder_in_the_text(self, text, with_ecg, processor):
        content = [ecg_part(), text] if with_ecg else [text]
        with pytest.raises(ValueError, match=rf"has {1 + with_ecg} <signal> placeholders .* for {int(with_ecg)} ECGs"):
            inputs_of(processor, chat(content))

    def test_some_ecgs_without_data(self, processor):
        with pytest.raises(ValueError, match="1 of 3 ECGs of the chat have no data; give each its 'ecg' or 'path'"):
            inputs_of(processor, chat([ecg_part(), {"type": "ecg"}, ecg_part()]))

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_ecgs_beside_the_chat_of_another_number(self, number, processor):
        given = {"ecgs": [ecg()] * number, "sampling_rate": 250} if number else {}
        with pytest.raises(ValueError, match=rf"has 2 <signal> placeholders \(\[2\] by sample\) for {number} ECGs"):
            inputs_of(processor, chat([{"type": "ecg"}, {"type": "ecg"}]), **given)

    def test_missing_sampling_rate(self, processor):
        with pytest.raises(ValueError, match="no sampling rate"):
            inputs_of(processor, chat([{"type": "ecg", "ecg": ecg()}, "Q"]))

    def test_the_bad_one_of_several_ecgs_is_named(self, processor):
        bad = ecg_part(ecg=np.full((12, 500), np.nan, dtype=np.float32))
        with pytest.raises(ValueError, match="ECG 1 of 2, counted from 0: Lead I is NaN throughout"):
            inputs_of(processor, [chat([ecg_part()]), chat([bad])])


PART = {"array": simulated_leads(["II", "V1", "V5"]), "sampling_rate": 100, "lead_names": ["II", "V1", "V5"]}


class TestMissingLeads:
    """What the model is shown of a record of three leads."""

    THERE = [lead in PART["lead_names"] for lead in STANDARD_LEADS]

    def test_signal(self):
        processor = tiny_processor(sampling_rate=100, missing_leads="zeros")
        assert processor.model_input_names[:2] == ["ecg_values", "ecg_lead_mask"]
        inputs = inputs_of(processor, [chat([{"type": "ecg", "ecg": PART}, "a"]), chat([ecg_part(sampling_rate=100)])])
        assert inputs["ecg_lead_mask"].tolist() == [self.THERE, [True] * 12]
        assert inputs["ecg_values"].abs().amax(-1).bool().tolist() == [self.THERE, [True] * 12]

    def test_symbolic(self):
        """As a processor of these leads alone would write it, in the order of all."""
        ecg_byte = tiny_ecg_byte(across_leads=False)
        extractor = {"missing_leads": "zeros"}
        processor = tiny_symbolic_processor(ecg_byte=ecg_byte, extractor=extractor)
        (ids,) = processor(text="<signal>", ecgs=PART)["input_ids"]
        assert ids == symbolic_ids(processor, PART["array"], PART["lead_names"])
        array = processor.decode_ecg(ids, -1, 1)[0]["array"]
        assert (~np.isnan(array).any(1)).tolist() == self.THERE
        with pytest.raises(
            ValueError, match="one sequence of all leads without their names, so that none can be left out"
        ):
            tiny_symbolic_processor(ecg_byte=tiny_ecg_byte(across_leads=True), extractor=extractor)

    def test_symbolic_without_room(self, caplog):
        """Leads go in the same order; a record that has no others keeps its own."""
        extractor = {"missing_leads": "zeros"}
        processor = tiny_symbolic_processor(ecg_byte=tiny_ecg_byte(across_leads=False), extractor=extractor)
        one = {**PART, "array": PART["array"][2:], "lead_names": ["V5"]}
        both = {"text": "<signal><signal>", "ecgs": [PART, one]}
        (ids,) = processor(**both)["input_ids"]
        processor.max_length, processor.overflow = len(ids) - 1, "drop_leads"
        (ids,) = processor(**both)["input_ids"]
        three = symbolic_ids(processor, PART["array"][:2], ["II", "V1"])
        assert ids == three + symbolic_ids(processor, one["array"], ["V5"])
        assert caplog.messages[-1].endswith("their leads V5 are left out.")

    def test_rgb(self):
        """The paper has room for all leads and their names; only the lines are missing."""
        processor = tiny_image_processor_elm("vit", missing_leads="zeros")
        whole = {"array": simulated_leads(STANDARD_LEADS), "sampling_rate": 100}
        full, part = (np.asarray(processor.draw(ecg)).astype(int) for ecg in (whole, PART))
        record = ECGRecord(PART["array"], 100, tuple(PART["lead_names"]))
        drawn = draw_ecg(record, *full.shape[:2], processor.image_processor.paper, lead_names=STANDARD_LEADS)
        np.testing.assert_array_equal(part, np.asarray(drawn))
        assert (part >= full).all()  # the paper is brighter than the lines
        assert (part != full).mean() > 0.05
        flat = {**whole, "array": whole["array"] * np.array(self.THERE)[:, None]}
        assert (np.asarray(processor.draw(flat)) < part).any()
        pixels = processor(ecgs=[PART, whole], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(pixels[0], processor(ecgs=PART, return_tensors="np")["pixel_values"][0])

    def test_rgb_with_a_column_without_a_lead(self):
        v1, v6 = (ECGRecord(simulated_leads([lead]), 100, (lead,)) for lead in ("V1", "V6"))
        paper = ECGPaper(layout="3x4")
        one, other = (np.asarray(draw_ecg(record, 400, 600, paper, lead_names=STANDARD_LEADS)) for record in (v1, v6))
        np.testing.assert_array_equal(one[:, :300], other[:, :300])
        assert (one[:, 310:] != other[:, 310:]).any()

    @pytest.mark.parametrize(("normalization", "grey"), [("none", 127), ("minmax", 0)])
    def test_stacked_signal(self, normalization, grey):
        processor = tiny_image_processor_elm(
            "vit", "stacked_signal", missing_leads="zeros", normalization=normalization
        )
        processor.image_processor.value_range = [-2.0, 2.0] if normalization == "none" else [0.0, 1.0]
        picture = np.asarray(processor.draw(PART))
        assert picture.shape == (12, 500, 3)
        assert (picture[~np.array(self.THERE)] == grey).all()
        assert all(np.ptp(picture[row]) for row in np.flatnonzero(self.THERE))


class TestTextOnly:
    """The processor of an ELM without ECG features."""

    @pytest.fixture(scope="class")
    def text_processor(self):
        return tiny_processor("qwen2_5", num_ecg_tokens=0)

    def test_text(self, text_processor):
        assert text_processor.batch_decode(text_processor(text="Q")["input_ids"]) == ["Q"]
        assert inputs_of(text_processor, chat(["Q"])).keys() == {"input_ids", "attention_mask"}

    def test_ecg(self, text_processor):
        for call in (lambda: text_processor(ecgs=ecg(), sampling_rate=250), lambda: inputs_of(text_processor, chat([ecg_part()]))):  # fmt: skip
            with pytest.raises(ValueError, match=r"text-only model \(num_ecg_tokens=0\), which takes no ECG"):
                call()

    @pytest.mark.parametrize("content", ["<signal>", {"type": "ecg"}])
    def test_placeholder(self, content, text_processor):
        with pytest.raises(ValueError, match="has 1 <signal> placeholders"):
            inputs_of(text_processor, chat([content]))


class TestConstruction:
    def test_tokenizer_without_placeholder(self):
        with pytest.raises(ValueError, match=r"has no token '<signal>'\. Add it"):
            ELMProcessor(ECGFeatureExtractor(), tiny_tokenizer())

    def test_negative_number_of_tokens(self, processor):
        with pytest.raises(ValueError, match="num_ecg_tokens is -1; it must be at least 0"):
            ELMProcessor(processor.feature_extractor, processor.tokenizer, num_ecg_tokens=-1)

    def test_input_names(self, processor):
        assert set(processor.model_input_names) >= {"input_ids", "attention_mask", "ecg_values"}
        text_only = tiny_processor(num_ecg_tokens=0)
        assert text_only.model_input_names == text_only.tokenizer.model_input_names

    def test_decode(self, processor):
        ids = processor(text=["sinus<|eot_id|>", "ST"], padding=False)["input_ids"]
        assert processor.batch_decode(ids, skip_special_tokens=True) == ["sinus", "ST"]
        assert processor.decode(ids[0]) == "sinus<|eot_id|>"


def test_system_prompt(processor):
    """It stands before each chat that begins with none, as if the chat had it; an empty one is none."""
    asked = copy(processor)
    asked.system_prompt = "Be brief."
    own = [{"role": "system", "content": "Its own."}, *chat(["Q"], ["A"])]
    brief = [{"role": "system", "content": "Be brief."}, *chat(["Q"], ["A"])]
    texts = processor.apply_chat_template([brief, own, own], tokenize=False)
    assert asked.apply_chat_template([chat(["Q"], ["A"]), own, own], tokenize=False) == texts
    assert asked.apply_chat_template(chat(["Q"], ["A"])) == texts[0]
    with_ecg = chat([ecg_part(), "Q"])
    inputs = inputs_of(asked, [with_ecg])
    expected = inputs_of(processor, [[brief[0], *with_ecg]])
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    asked.system_prompt = ""
    assert asked.apply_chat_template(chat(["Q"])) == processor.apply_chat_template(chat(["Q"]))
    with pytest.raises(ValueError, match="system_prompt is 3; expected a text or None"):
        ELMProcessor(processor.feature_extractor, processor.tokenizer, system_prompt=3)


@pytest.mark.slow
@pytest.mark.minutes
def test_fresh_process_without_the_project_and_torchvision(processor, tmp_path):
    """AutoProcessor gives the same inputs with the same template, and what it saves again is the same."""
    first, second = tmp_path / "first", tmp_path / "second"
    processor = copy(processor)
    processor.system_prompt = "Be brief."
    processor.save_pretrained(first)
    of_pictures = {name: tiny_image_processor_elm(*name.split("-")) for name in PICTURES}
    for name, picture_processor in of_pictures.items():
        picture_processor.save_pretrained(tmp_path / name)
    np.save(tmp_path / "ecg.npy", ecg())
    run_isolated(
        f"""
import sys
sys.modules["torchvision"] = None  # as if it were not installed
import numpy as np
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoProcessor
processor = AutoProcessor.from_pretrained("first", trust_remote_code=True)
processor.save_pretrained("second")
processor = AutoProcessor.from_pretrained("second", trust_remote_code=True)
ecg = {{"type": "ecg", "ecg": np.load("ecg.npy"), "sampling_rate": 250}}
chats = [[{{"role": "user", "content": [ecg, {{"type": "text", "text": "Q"}}]}}, {{"role": "assistant", "content": "A"}}],
         [{{"role": "user", "content": "Hello"}}, {{"role": "assistant", "content": "A long answer"}}]]
inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt",
                                       return_assistant_tokens_mask=True)
save_file(dict(inputs), "inputs.safetensors")
for name in {list(of_pictures)}:
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    save_file(dict(processor(text="<signal>", ecgs="ecg.npy", sampling_rate=250, return_tensors="pt")), f"{{name}}.safetensors")
    image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
    assert image_processor.to_dict() == processor.image_processor.to_dict()
""",
        tmp_path,
        anew=True,
    )
    for name, picture_processor in of_pictures.items():
        inputs = picture_processor(text="<signal>", ecgs=ecg(), sampling_rate=250, return_tensors="pt")
        loaded = load_file(tmp_path / f"{name}.safetensors")
        assert loaded.keys() == inputs.keys()
        assert all(torch.equal(loaded[key], inputs[key]) for key in loaded)
    chats = [chat([ecg_part(), "Q"], ["A"]), chat(["Hello"], ["A long answer"])]
    expected = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert "Be brief." in processor.tokenizer.decode(expected["input_ids"][0])
    loaded = load_file(tmp_path / "inputs.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in second.iterdir()}
    assert names >= {"chat_template.jinja", "processing_elm.py", "feature_extraction_elm.py", "ecg_utils.py"}
    for name in names - {"tokenizer_config.json"}:  # it names the folder's classes in another order
        assert (first / name).read_text() == (second / name).read_text(), name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "audio_tokenizer",
            {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "nowhere/else"},
            r"processor_config\.json names a part AutoModel \(audio_tokenizer\), which .* does not have; take it out",
        ),
        (
            "video_processor",
            {"video_processor_type": "X"},
            r"processor_config\.json of .* has video_processor, which .* not know",
        ),
        (
            "num_ecg_token",
            4,
            r"processor_config\.json of .* has num_ecg_token, which the processor of an ELM does not know",
        ),
    ],
)
def test_saved_fields_that_no_processor_has(field, value, message, processor, tmp_path, monkeypatch):
    """A model that they name is not looked for."""
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        ELMProcessor.from_pretrained(tmp_path)


def test_loads_without_the_registry(processor, tmp_path, monkeypatch):
    """`from elm_ecg import ELMProcessor` alone registers nothing, and AutoFeatureExtractor would ask to run the saved code."""

    def ask(*args, **kwargs):
        raise AssertionError("AutoFeatureExtractor is asked")

    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(AutoFeatureExtractor, "from_pretrained", ask)
    loaded = ELMProcessor.from_pretrained(tmp_path)
    assert type(loaded.feature_extractor) is ECGFeatureExtractor
    assert loaded.feature_extractor.to_dict() == processor.feature_extractor.to_dict()


def test_a_real_record(shared):
    """PTB-XL at 500 Hz, in microvolts, cut to the model's 2 s."""
    counts = np.load(shared / "data/ptbxl/raw500.npz")["ecg"][0]
    processor = tiny_processor(truncation="start")
    inputs = inputs_of(processor, chat([{"type": "ecg", "ecg": counts, "sampling_rate": 500, "unit": "uV"}, "Q"]))
    assert inputs["ecg_values"].shape == (1, 12, 500)
    difference = inputs["ecg_values"][0, :, 10:-10] - torch.tensor(counts[:, 20:980:2] / 1000)
    assert difference.abs().median() < 0.02  # millivolts: the filter before the halved rate changes little


def simulated(index=0, millivolts=1.0):
    """A simulated record [12, 500] of 5 s at 100 Hz, as the symbolic processors take it."""
    row = make_record(index, 1, sampling_rate=100, seconds=5.0)
    return {**row["ecg"], "array": millivolts * row["ecg"]["array"] / np.float32(1e3), "unit": "mV"}


PICTURES = [
    f"{backbone}-{representation}"
    for backbone in ("clip_vision_model", "siglip2_vision_model")
    for representation in ("rgb", "stacked_signal")
]


@pytest.fixture(scope="module", params=PICTURES)
def pictures(request):
    """A processor of ECGs of 5 s at 100 Hz as pictures."""
    return tiny_image_processor_elm(*request.param.split("-"))


@pytest.fixture(scope="module")
def drawing():
    return tiny_image_processor_elm("clip_vision_model")


class TestPictures:
    def test_call(self, pictures):
        ecgs = [simulated(0), simulated(1)]
        inputs = pictures(text=["a<signal>", "b", "<signal>"], ecgs=ecgs, return_tensors="pt")
        assert set(inputs) == set(pictures.model_input_names)
        assert (inputs["input_ids"] == pictures.ecg_token_id).sum(1).tolist() == [4, 0, 4]
        values = pictures.feature_extractor(ecgs)["ecg_values"]
        expected = pictures.image_processor([ECGRecord(value, 100.0, STANDARD_LEADS) for value in values])
        for name in pictures.image_processor.model_input_names:
            np.testing.assert_array_equal(inputs[name], expected[name])
        assert inputs["pixel_values"].dtype == torch.float32

    def test_ecgs_only(self, pictures):
        inputs = pictures(ecgs=simulated(), return_tensors="pt")
        assert list(inputs) == pictures.image_processor.model_input_names

    def test_chats_with_several_ecgs_and_with_none(self, pictures):
        parts = [{"type": "ecg", "ecg": simulated(index)} for index in range(4)]
        chats = [
            chat([parts[0], "Compare with", parts[1], "please."], ["no"], [parts[2], "And now?"]),
            chat(["No ECG here."]),
            chat([parts[3], "Q"]),
        ]
        batch = inputs_of(pictures, chats)
        alone = [inputs_of(pictures, messages) for messages in chats]
        assert alone[1].keys() == {"input_ids", "attention_mask"}
        for ids, mask, single in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
            assert torch.equal(ids[mask.bool()], single["input_ids"][0])
        assert [(ids == pictures.ecg_token_id).sum() for ids in batch["input_ids"]] == [12, 0, 4]
        for name in pictures.image_processor.model_input_names:
            assert torch.equal(batch[name], torch.cat([alone[0][name], alone[2][name]]))

    @pytest.mark.parametrize("number", [0, 1, 3])
    def test_placeholders_and_ecgs_of_different_number(self, number, pictures):
        with pytest.raises(ValueError, match=rf"has 2 <signal> placeholders \(\[2\] by sample\) for {number} ECGs"):
            pictures(text="<signal><signal>", ecgs=[simulated()] * number or None)

    def test_draw_is_what_the_backbone_sees(self, pictures):
        picture = pictures.draw(simulated())
        values = pictures.image_processor.image_processor(picture, return_tensors="np")["pixel_values"]
        if pictures.representation == "rgb":
            np.testing.assert_allclose(pictures(ecgs=simulated())["pixel_values"], values, atol=1e-6)
        else:
            assert picture.size == (500, 12)

    def test_any_rate_unit_and_lead_order(self, pictures):
        ecg = simulated()
        turned = {"array": 1e3 * ecg["array"][::-1], "lead_names": STANDARD_LEADS[::-1], "unit": "uV"}
        assert np.array_equal(pictures.draw(ecg), pictures.draw(turned, sampling_rate=100))
        assert np.array_equal(pictures.draw(ecg), pictures.draw(ecg["array"], sampling_rate=100, unit="mV"))
        fast = {**ecg, "array": resample(ecg["array"], 100, 400), "sampling_rate": 400}
        difference = np.abs(np.asarray(pictures.draw(fast), dtype=int) - np.asarray(pictures.draw(ecg)))
        assert difference.mean() < 3 < np.abs(np.asarray(pictures.draw(simulated(1)), dtype=int) - difference).mean()

    @pytest.mark.parametrize("representation", ["rgb", "stacked_signal"])
    def test_short_records(self, representation):
        """Stacked they are padded as signals are; a drawing ends where the record ends, at the same scale."""
        processor = tiny_image_processor_elm("clip_vision_model", representation)
        ecg = simulated()
        short = {**ecg, "array": ecg["array"][:, :300] + np.float32(2)}
        picture, whole = np.asarray(processor.draw(short)), np.asarray(processor.draw(ecg))
        assert picture.shape == whole.shape
        if representation == "stacked_signal":
            assert (picture[:, 300:] == 0).all()
            assert picture[:, :300].min() == 0
            assert picture[:, :300].max() == 254  # epsilon of the normalization
        else:
            end = round(160 * (10 + 3 * 25 + 5) / (10 + 5 * 25 + 5))  # millimetres of paper
            array = processor.feature_extractor(short, padding=False)["ecg_values"][0]
            assert np.array_equal(picture[:, :end], draw_ecg(ECGRecord(array, 100.0, STANDARD_LEADS), 160, end))
            assert (picture[:, end:] == picture[-1, -1]).all()
            assert (picture[:, end - 1] != picture[-1, -1]).any()
        assert np.array_equal(processor(ecgs=[short])["pixel_values"], processor(ecgs=[ecg, short])["pixel_values"][1:])

    def test_scans_in_place_of_ecgs(self, drawing):
        scan = Image.effect_noise((300, 200), 50)
        part = {"type": "ecg", "ecg": scan}
        ecg = {"type": "ecg", "ecg": simulated()}
        inputs = inputs_of(drawing, chat([ecg, part, "Same?"]))
        assert (inputs["input_ids"] == drawing.ecg_token_id).sum() == 8
        expected = drawing.image_processor([scan.convert("RGB").resize((160, 160), Image.Resampling.BICUBIC)])
        np.testing.assert_array_equal(inputs["pixel_values"][1:], expected["pixel_values"])
        np.testing.assert_array_equal(inputs["pixel_values"][:1], drawing(ecgs=simulated())["pixel_values"])
        for ecgs in (scan, [scan]):
            np.testing.assert_array_equal(drawing(text="<signal>", ecgs=ecgs)["pixel_values"], expected["pixel_values"])
        assert drawing.draw(scan) is scan

    def test_scans_where_no_drawings_are_read(self, processor):
        scan = Image.new("RGB", (300, 200))
        stacked = tiny_image_processor_elm("vit", "stacked_signal")
        for call in (lambda: stacked(ecgs=[simulated(), scan]), lambda: stacked.draw(scan)):
            with pytest.raises(
                ValueError, match="A picture in place of an ECG, but representation 'stacked_signal' takes samples"
            ):
                call()
        for ecgs in (scan, [scan]):
            with pytest.raises(
                ValueError, match="A picture in place of an ECG, but representation 'signal' takes samples"
            ):
                processor(ecgs=ecgs, sampling_rate=250)

    def test_no_ecg(self, drawing):
        with pytest.raises(ValueError, match="There is no ECG"):
            drawing(ecgs=[])

    def test_bad_ecgs(self, drawing):
        with pytest.raises(ValueError, match="no sampling rate"):
            drawing(ecgs=simulated()["array"])
        with pytest.raises(ValueError, match="The ECG is 10 s long"):
            drawing(ecgs={**simulated(), "sampling_rate": 50})

    def test_draw_of_other_representations(self, processor):
        with pytest.raises(ValueError, match="representation is 'signal'; only stacked_signal and rgb show ECGs"):
            processor.draw(ecg(), sampling_rate=250)

    @pytest.mark.parametrize(
        ("representation", "of_images", "message"),
        [
            (
                "rgb",
                None,
                "representation='rgb' with no image_processor; 'stacked_signal' and 'rgb' need one of theirs",
            ),
            ("rgb", "stacked_signal", "representation='rgb' with one of 'stacked_signal'"),
            ("stacked_signal", "rgb", "representation='stacked_signal' with one of 'rgb'"),
            ("signal", "rgb", "representation='signal' with one of 'rgb'; .* the others take none"),
        ],
    )
    def test_image_processor_of_another_representation(self, representation, of_images, message, processor):
        image_processor = of_images and tiny_image_processor("vit", of_images)
        with pytest.raises(ValueError, match=message):
            ELMProcessor(
                processor.feature_extractor,
                processor.tokenizer,
                representation=representation,
                image_processor=image_processor,
            )

    def test_saved_and_loaded(self, pictures, tmp_path):
        pictures.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        own = pictures.image_processor.image_processor
        assert saved["image_processor"]["image_processor"] == json.loads(own.to_json_string())
        loaded = ELMProcessor.from_pretrained(tmp_path, trust_remote_code=True)
        assert loaded.image_processor.to_dict() == pictures.image_processor.to_dict()
        inputs, expected = (processor(text="<signal>", ecgs=simulated()) for processor in (loaded, pictures))
        assert inputs.keys() == expected.keys()
        assert all(np.array_equal(inputs[name], expected[name]) for name in inputs)


def symbolic_ids(processor, array, leads=STANDARD_LEADS):
    """Token by token, as the processor should put it: names of ECG-Byte's tokens, each lead after its own token."""
    names, samples = [], 0
    for token_id in processor.ecg_tokenizer.encode(np.ascontiguousarray(array)):
        if samples % array.shape[1] == 0 and not processor.ecg_tokenizer.across_leads:
            names.append(f"signal_{leads[samples // array.shape[1]]}")
        names.append(f"signal_{token_id}")
        samples += len(processor.ecg_tokenizer.symbols(token_id))
    return processor.tokenizer.convert_tokens_to_ids(names)


@pytest.fixture(scope="module", params=[True, False], ids=["across leads", "within leads"])
def symbolic(request):
    return tiny_symbolic_processor(ecg_byte=tiny_ecg_byte(across_leads=request.param))


class TestSymbolic:
    def test_tokens_stand_where_the_ecg_stands(self, symbolic):
        ecgs = [simulated(0), simulated(1)]
        inputs = symbolic(text=["a <signal> b <signal>", "c"], ecgs=ecgs, padding_side="right", return_tensors="pt")
        assert inputs.keys() == {"input_ids", "attention_mask"}
        words = [symbolic.tokenizer.encode(text, add_special_tokens=False) for text in ("a ", " b ", "c")]
        tokens = [symbolic_ids(symbolic, ecg["array"]) for ecg in ecgs]
        expected = words[0] + tokens[0] + words[1] + tokens[1]
        assert inputs["input_ids"][0].tolist() == expected
        assert inputs["attention_mask"].sum(1).tolist() == [len(expected), 1]
        assert inputs["input_ids"][1, :1].tolist() == words[2]

    def test_chat_with_ecgs_in_several_turns(self, symbolic):
        parts = [{"type": "ecg", "ecg": simulated(index)} for index in range(3)]
        chats = [chat([parts[0], "Is it?"], ["no"], [parts[1], parts[2], "And now?"]), chat(["Hello"])]
        inputs = inputs_of(symbolic, chats)
        alone = [inputs_of(symbolic, [one]) for one in chats]
        for ids, mask, single in zip(inputs["input_ids"], inputs["attention_mask"], alone, strict=True):
            assert ids[mask.bool()].tolist() == single["input_ids"][0].tolist()
        ids = inputs["input_ids"][0].tolist()
        for part in parts:
            tokens = symbolic_ids(symbolic, part["ecg"]["array"])
            assert any(ids[place : place + len(tokens)] == tokens for place in range(len(ids)))
        assert symbolic.ecg_token_id not in ids

    def test_an_ecg_that_is_answered_is_learnt(self, symbolic):
        ecg = {"type": "ecg", "ecg": simulated()}
        batch = symbolic.apply_chat_template(
            [chat(["Draw one."], [ecg])], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learnt = [token for token, mask in zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True) if mask]
        tokens = symbolic_ids(symbolic, ecg["ecg"]["array"])
        assert learnt[: len(tokens)] == tokens
        assert symbolic.tokenizer.decode(learnt[len(tokens) :]) == "<|eot_id|>"

    def test_short_ecgs_are_not_padded(self, symbolic):
        ecg = simulated()
        short = {**ecg, "array": ecg["array"][:, :200]}
        inputs = symbolic(text="<signal>", ecgs=short)
        assert inputs["input_ids"][0] == symbolic_ids(symbolic, short["array"])

    def test_any_rate_unit_and_lead_order(self, symbolic):
        ecg = simulated()
        turned = {
            "array": 1e3 * ecg["array"][::-1],
            "sampling_rate": 100,
            "lead_names": STANDARD_LEADS[::-1],
            "unit": "uV",
        }
        expected = symbolic(text="<signal>", ecgs=ecg)["input_ids"]
        assert symbolic(text="<signal>", ecgs=turned)["input_ids"] == expected

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side, symbolic):
        inputs = symbolic(text=["<signal>", "a"], ecgs=[simulated()], padding_side=side, return_offsets_mapping=True)
        assert len({len(ids) for ids in inputs["input_ids"]}) == 1
        assert [len(offsets) for offsets in inputs["offset_mapping"]] == [len(ids) for ids in inputs["input_ids"]]
        assert inputs["offset_mapping"][1][0 if side == "left" else -1] == (0, 0)
        assert set(inputs["offset_mapping"][0]) == {(0, len("<signal>"))}

    def test_decode_ecg(self, symbolic):
        ecgs = [simulated(0), simulated(1)]
        inputs = symbolic(text="one <signal> two <signal>", ecgs=ecgs, return_tensors="pt")
        low, high = -4.0, 4.0
        decoded = symbolic.decode_ecg(inputs["input_ids"][0], low, high)
        assert len(decoded) == 2
        for ecg, original in zip(decoded, ecgs, strict=True):
            own = symbolic.ecg_tokenizer.value_range(original["array"])
            expected = symbolic.ecg_tokenizer.encode(original["array"])
            np.testing.assert_array_equal(ecg["array"], symbolic.ecg_tokenizer.decode(expected, low, high, 12))
            (exact,) = symbolic.decode_ecg(symbolic(text="<signal>", ecgs=original)["input_ids"][0], *own)
            assert abs(exact["array"] - original["array"]).max() <= (own[1] - own[0]) / 26 + 1e-5
            assert symbolic(text="<signal>", ecgs=exact)["input_ids"]  # in the form that the processor takes

    def test_decode_ecg_of_an_unfinished_one(self, symbolic):
        ids = symbolic_ids(symbolic, simulated()["array"])
        (whole,) = symbolic.decode_ecg(ids, 0, 1)
        (part,) = symbolic.decode_ecg(ids[: len(ids) // 2], 0, 1)
        there = ~np.isnan(part["array"])
        assert 0.2 < there.mean() < 0.8
        np.testing.assert_array_equal(part["array"][there], whole["array"][there])
        with pytest.raises(ValueError, match="NaN"):
            as_record(part)

    def test_decode_ecg_errors(self, symbolic, processor):
        ids = symbolic_ids(symbolic, simulated()["array"])
        with pytest.raises(ValueError, match="give low and high"):
            symbolic.decode_ecg(ids)
        with pytest.raises(ValueError, match="expected at most"):
            symbolic.decode_ecg(ids, 0, 1, num_samples=400)
        with pytest.raises(ValueError, match="only 'symbolic' ECGs are tokens"):
            processor.decode_ecg(ids, 0, 1)
        with pytest.raises(ValueError, match="The token ids are a batch"):
            symbolic.decode_ecg(torch.tensor([ids]), 0, 1)
        assert symbolic.decode_ecg(symbolic.tokenizer.encode("no ECG"), 0, 1) == []
        if not symbolic.ecg_tokenizer.across_leads:
            with pytest.raises(ValueError, match="begins without the token of a lead"):
                symbolic.decode_ecg(ids[1:], 0, 1)

    def test_fixed_range_needs_no_range_to_decode(self):
        symbolic = tiny_symbolic_processor(ecg_byte=tiny_ecg_byte(millivolt_range=(-2.0, 2.0)))
        ecg = simulated()
        (decoded,) = symbolic.decode_ecg(symbolic(text="<signal>", ecgs=ecg)["input_ids"][0])
        assert abs(decoded["array"] - ecg["array"].clip(-2, 2)).max() <= 4 / 26 + 1e-5

    def test_ecgs_without_text(self, symbolic):
        with pytest.raises(ValueError, match="Symbolic ECGs stand in a text"):
            symbolic(ecgs=simulated())

    def test_truncation_is_refused(self, symbolic):
        with pytest.raises(ValueError, match="truncation would cut ECGs"):
            symbolic(text="<signal>", ecgs=simulated(), truncation=True, max_length=10)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"representation": "symbolic"}, "without an ecg_byte tokenizer"),
            ({"representation": "picture"}, "representation is 'picture'; expected one of"),
            ({"overflow": "cut"}, "overflow is 'cut'; expected one of"),
        ],
    )
    def test_impossible_arguments(self, changes, message, processor):
        with pytest.raises(ValueError, match=message):
            ELMProcessor(processor.feature_extractor, processor.tokenizer, **changes)

    def test_signal_with_an_ecg_tokenizer(self, symbolic):
        with pytest.raises(ValueError, match="representation='signal' with an ecg_byte tokenizer"):
            ELMProcessor(symbolic.feature_extractor, symbolic.tokenizer, ecg_byte=symbolic.ecg_tokenizer)

    def test_tokens_missing_in_the_vocabulary(self, symbolic, processor):
        count = len(ELMProcessor.signal_tokens(symbolic.ecg_tokenizer))
        with pytest.raises(ValueError, match=rf"lacks {count} of {count} ECG tokens, signal_97 first"):
            ELMProcessor(
                symbolic.feature_extractor,
                processor.tokenizer,
                representation="symbolic",
                ecg_byte=symbolic.ecg_tokenizer,
            )

    def test_no_token_of_a_lead_where_tokens_cross_leads(self):
        across, within = tiny_ecg_byte(across_leads=True), tiny_ecg_byte(across_leads=False)
        assert len(ELMProcessor.signal_tokens(across)) == across.vocab_size
        assert ELMProcessor.signal_tokens(within, ["I", "V1"])[-3:] == ["signal_315", "signal_I", "signal_V1"]

    def test_pushed_and_saved_files(self, symbolic, tmp_path):
        files = symbolic.save_pretrained(tmp_path)
        assert str(tmp_path / "ecg_byte.json") in files
        assert "merges" not in (tmp_path / "processor_config.json").read_text()
        loaded = ELMProcessor.from_pretrained(tmp_path, trust_remote_code=True)
        assert loaded.ecg_tokenizer.to_json() == symbolic.ecg_tokenizer.to_json()
        assert loaded.signal_token_ids == symbolic.signal_token_ids


class TestOverflow:
    """What becomes of a text that its symbolic ECGs make too long."""

    def sizes(self, processor, **changes):
        return len(processor(text="<signal>", ecgs=simulated(), **changes)["input_ids"][0])

    @pytest.fixture
    def symbolic(self):
        return tiny_symbolic_processor(ecg_byte=tiny_ecg_byte(across_leads=False))

    def test_what_fits_is_left_alone(self, symbolic, caplog):
        size = self.sizes(symbolic)
        symbolic.max_length, symbolic.overflow = size, "downsample"
        assert self.sizes(symbolic) == size
        assert not caplog.records

    def test_error(self, symbolic):
        size = self.sizes(symbolic)
        symbolic.max_length = size
        with pytest.raises(
            ValueError, match=rf"Text 1 of 2 has {size} tokens of 1 ECGs and room for {size - 1} beside"
        ):
            symbolic(text=["a", "a<signal>"], ecgs=simulated())
        with pytest.raises(ValueError, match=r"has 0 tokens of 0 ECGs and room for 0 beside its words"):
            symbolic(text="a" * (size + 1))

    def test_downsample(self, symbolic, caplog):
        size = self.sizes(symbolic)
        ecg = simulated()
        symbolic.max_length, symbolic.overflow = size - 1, "downsample"
        ids = symbolic(text=["<signal>", "x"], ecgs=ecg, padding=False)["input_ids"]
        expected = symbolic_ids(symbolic, resample(ecg["array"], 100, 50))
        assert ids[0] == expected
        assert caplog.messages == [
            f"Text 0 of 2 has {size} tokens of 1 ECGs and room for {size - 1} beside its words (max_length={size - 1}): they "
            "are resampled from 100 to 50 Hz."
        ]

    def test_downsample_stops_at_30_hz(self, symbolic):
        """There would be room at 25 Hz, but a QRS complex would be two samples or three."""
        size = len(symbolic_ids(symbolic, resample(simulated()["array"], 100, 25)))
        symbolic.max_length, symbolic.overflow = size, "downsample"
        with pytest.raises(ValueError, match="it is 'downsample'"):
            self.sizes(symbolic)

    def test_drop_leads(self, symbolic, caplog):
        size = self.sizes(symbolic)
        ecg = simulated()
        symbolic.max_length, symbolic.overflow = size // 2, "drop_leads"
        (ids,) = symbolic(text="<signal>", ecgs=ecg)["input_ids"]
        assert len(ids) <= size // 2
        leads = symbolic.tokenizer.convert_ids_to_tokens(ids)
        kept = [name.removeprefix("signal_") for name in leads if name.removeprefix("signal_") in STANDARD_LEADS]
        left_out = [lead for lead in DISPENSABLE_LEADS if lead not in kept]
        assert left_out == list(DISPENSABLE_LEADS[: len(left_out)])  # no more than had to go, in the order that is said
        assert 4 <= len(left_out) < 12
        assert ids == symbolic_ids(symbolic, ecg["array"][[STANDARD_LEADS.index(lead) for lead in kept]], kept)
        (message,) = caplog.messages
        assert message.endswith(f"their leads {', '.join(left_out)} are left out.")
        array = symbolic.decode_ecg(ids, 0, 1)[0]["array"]
        assert [name for name, lead in zip(STANDARD_LEADS, array, strict=True) if not np.isnan(lead).any()] == kept

    @pytest.mark.parametrize("number", [7, 8, 9, 10, 11])
    def test_order_in_which_leads_are_dropped(self, number):
        """Lead II stays longest, the rhythm strip, then V1, whose P wave is best to see, V5 and I."""
        # in a fixed range, so that the tokens of a lead do not depend on the other leads
        symbolic = tiny_symbolic_processor(ecg_byte=tiny_ecg_byte(across_leads=False, millivolt_range=(-2, 2)))
        ecg = simulated()
        dropped = ["aVR", "aVL", "aVF", "III", "V4", "V6", "V2", "V3", "I", "V5", "V1"][:number]
        kept = [lead for lead in STANDARD_LEADS if lead not in dropped]
        expected = symbolic_ids(symbolic, ecg["array"][[STANDARD_LEADS.index(lead) for lead in kept]], kept)
        symbolic.max_length, symbolic.overflow = len(expected), "drop_leads"
        assert symbolic(text="<signal>", ecgs=ecg)["input_ids"] == [expected]

    def test_one_lead_too_many(self, symbolic):
        symbolic.max_length, symbolic.overflow = 5, "drop_leads"
        with pytest.raises(ValueError, match="room for 5 beside its words"):
            self.sizes(symbolic)

    def test_several_ecgs_share_the_room(self, symbolic):
        size = self.sizes(symbolic)
        symbolic.max_length, symbolic.overflow = 2 * size - 1, "downsample"
        (ids,) = symbolic(text="<signal><signal>", ecgs=[simulated()] * 2)["input_ids"]
        half = symbolic_ids(symbolic, resample(simulated()["array"], 100, 50))
        assert ids == half + half


def test_symbolic_in_a_fresh_process_without_the_project(tmp_path):
    np.save(tmp_path / "ecg.npy", simulated()["array"])
    processors = {
        across: tiny_symbolic_processor(ecg_byte=tiny_ecg_byte(across_leads=across)) for across in (True, False)
    }
    for across, processor in processors.items():
        processor.save_pretrained(tmp_path / str(across))
    code = """
import numpy as np
from transformers import AutoProcessor
for folder in ("True", "False"):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    ids = processor(text="<signal> is?", ecgs="ecg.npy", sampling_rate=100)["input_ids"][0]
    print(*ids)
    print(*np.round(processor.decode_ecg(ids, -1, 1)[0]["array"][:, ::100].ravel(), 6))
"""
    lines = run_isolated(code, tmp_path).splitlines()[-4:]
    for processor, ids, values in zip(processors.values(), lines[::2], lines[1::2], strict=True):
        expected = processor(text="<signal> is?", ecgs=simulated())["input_ids"][0]
        assert [int(token_id) for token_id in ids.split()] == expected
        array = processor.decode_ecg(expected, -1, 1)[0]["array"]
        assert [float(value) for value in values.split()] == pytest.approx(array[:, ::100].ravel(), abs=1e-5)
