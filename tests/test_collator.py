from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.training import augmentation
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.synthetic import make_record
from helpers import FAMILIES, tiny_image_processor_elm, tiny_processor, tiny_symbolic_processor


def row(*turns: str, ecg: bool = True) -> dict[str, Any]:
    """A chat of alternating user and assistant turns about a record of noise."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    array = np.random.default_rng(len(turns)).normal(size=(12, 500)).astype("float32")
    return {"messages": messages, "ecg": {"array": array, "sampling_rate": 250, "unit": "mV"} if ecg else None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def learnt(processor, labels: torch.Tensor) -> list[str]:
    """The stretches of text that are labels, decoded."""
    texts, current = [], []
    for label in [*labels.tolist(), -100]:
        if label != -100:
            current.append(label)
        elif current:
            texts.append(processor.tokenizer.decode(current))
            current = []
    return texts


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama3", ["yes<|eot_id|>", "no, é<|eot_id|>"]),
        ("qwen2_5", ["yes<|im_end|>", "no, é<|im_end|>"]),
        ("gemma2", ["yes<end_of_turn>", "no, é<end_of_turn>", "<eos>"]),
        ("default", [" yes</s>", " no, é</s>"]),
    ],
)
def test_labels_are_the_assistants_turns(family, expected):
    assert family in FAMILIES
    processor = tiny_processor(family)
    batch = ELMCollator(processor)([row("Is it?", "yes", "And <this>?", "no, é"), row("Is it?", "yes")])
    assert learnt(processor, batch["labels"][0]) == expected
    assert learnt(processor, batch["labels"][1]) == [expected[0], *expected[2:]]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_padding_is_dynamic_and_on_the_right():
    processor = tiny_processor()
    rows = [row("Is it?", "yes"), row("Is it not, or is it?", "no")]
    both = ELMCollator(processor)(rows)
    alone = [ELMCollator(processor)([one]) for one in rows]
    lengths = [batch["input_ids"].shape[1] for batch in alone]
    assert both["input_ids"].shape[1] == max(lengths) > min(lengths)
    assert both["attention_mask"].sum(1).tolist() == lengths
    for index, (batch, length) in enumerate(zip(alone, lengths, strict=True)):
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(both[key][index, :length], batch[key][0])
        assert (both["labels"][index, length:] == -100).all()
        assert (both["attention_mask"][index, length:] == 0).all()
        assert torch.equal(both["ecg_values"][index], batch["ecg_values"][0])


def test_keys_of_a_batch():
    processor = tiny_processor()
    with_ecg, without = ELMCollator(processor)([row("a", "b")]), ELMCollator(processor)([row("a", "b", ecg=False)])
    assert set(with_ecg) == {"input_ids", "attention_mask", "labels", "ecg_values"}
    assert set(without) == {"input_ids", "attention_mask", "labels"}
    assert (with_ecg["input_ids"] == processor.ecg_token_id).sum() == 4


def test_system_prompt():
    processor = tiny_processor()
    processor.system_prompt = "Be brief."
    batch = ELMCollator(processor)([row("Is it?", "yes")])
    assert "Be brief." in processor.tokenizer.decode(batch["input_ids"][0])
    assert learnt(processor, batch["labels"][0]) == ["yes<|eot_id|>"]


def drawing_processor():
    return tiny_image_processor_elm("vit")


PROCESSORS = {"signal": tiny_processor, "symbolic": tiny_symbolic_processor, "rgb": drawing_processor}


@pytest.mark.parametrize("representation", PROCESSORS)
def test_perturb(representation):
    processor = PROCESSORS[representation]()
    ecgs = 0.1 * np.random.default_rng(0).normal(size=(2, 12, 500)).astype("float32")
    rate = processor.feature_extractor.sampling_rate
    rows = [row("Is it?", "yes"), row("Is it?", "yes", "Sure?", "no")]
    rows = [{**row, "ecg": {"array": ecg, "sampling_rate": rate}} for row, ecg in zip(rows, ecgs, strict=True)]
    changed = {}
    collator = ELMCollator(processor, perturb="noise")
    for name, values in (
        ("noise", [collator.ecgs_of_row(row)[0].array for row in rows]),
        ("zeros", np.zeros_like(ecgs)),
    ):
        changed[name] = [
            {**row, "ecg": {**row["ecg"], "array": array}} for row, array in zip(rows, values, strict=True)
        ]
    noise = np.stack([row["ecg"]["array"] for row in changed["noise"]])
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert not np.array_equal(noise[0], noise[1])
    for name, expected in changed.items():
        assert_same(ELMCollator(processor, perturb=name)(rows), ELMCollator(processor)(expected))
    plain, only_text = ELMCollator(processor)(rows), ELMCollator(processor, perturb="only_text")(rows)
    assert only_text.keys() == {"input_ids", "attention_mask", "labels"}
    assert not set(only_text["input_ids"].flatten().tolist()) & {processor.ecg_token_id, *processor.signal_token_ids}
    assert learnt(processor, only_text["labels"][1]) == learnt(processor, plain["labels"][1])


@pytest.mark.parametrize("perturb", ["noise", "zeros", "only_text"])
def test_perturb_lists_and_files(perturb, tmp_path):
    """Each of several ECGs by itself, arrays and files."""
    processor = tiny_processor()
    array = row("a")["ecg"]["array"]
    np.savez(tmp_path / "a.npz", array=array, sampling_rate=250)
    several = row("Is it?", "yes") | {"ecg": [{"array": array, "sampling_rate": 250}, str(tmp_path / "a.npz")]}
    batch = ELMCollator(processor, perturb=perturb)([several, row("Is it?", "yes") | {"ecg": str(tmp_path / "a.npz")}])
    if perturb == "only_text":
        assert "ecg_values" not in batch
        assert processor.ecg_token_id not in batch["input_ids"]
        return
    assert batch["ecg_values"].shape == (3, 12, 500)
    assert not torch.equal(batch["ecg_values"], ELMCollator(processor)([several, several])["ecg_values"][:3])
    assert float(batch["ecg_values"].std()) == pytest.approx({"noise": 1.0, "zeros": 0.0}[perturb], abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"perturb": "noize"}, "perturb is 'noize'; expected noise, zeros"), ({"gain_jitter": 2.0}, "gain_jitter is 2.0")],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ELMCollator(tiny_processor("llama3"), **options)


def test_text_only_processor_leaves_the_ecg_out():
    processor = tiny_processor(num_ecg_tokens=0)
    batch = ELMCollator(processor)([row("Is it?", "yes")])
    assert "ecg_values" not in batch
    assert processor.ecg_token_id not in batch["input_ids"]


def augmented(ecg, size, processor=None, **options):
    """What the collator makes of so many rows of one ECG, [size, leads, samples]."""
    rows = [row(f"Is it {index}?", "yes") | {"ecg": ecg} for index in range(size)]
    return ELMCollator(processor or tiny_processor(), **options)(rows)


RAMP = {"array": np.tile(np.arange(500, dtype=np.float32) / 250, (12, 1)), "sampling_rate": 250}


@pytest.mark.parametrize(("seconds", "most"), [(0.5, 0.5), (5.0, 1.0)])
def test_time_shift(seconds, most):
    """Up to so many seconds, at most half of two; what is left is padded."""
    values = augmented(RAMP, 200, time_shift=seconds)["ecg_values"]
    starts = values[:, 0, 0]
    assert starts.min() < 0.2 * most
    assert 0.9 * most < starts.max() <= most
    assert starts.mean() == pytest.approx(min(seconds / 2, 0.9), abs=0.1)
    for one, start in zip(values, starts, strict=True):
        length = 500 - round(float(start) * 250)
        np.testing.assert_array_equal(one[:, :length], RAMP["array"][:, 500 - length :])
        assert not one[:, length:].any()


def test_gain_jitter():
    gains = augmented(RAMP, 200, gain_jitter=0.2)["ecg_values"][:, :, 1:] / RAMP["array"][:, 1:]
    torch.testing.assert_close(gains, gains[:, :1, :1].expand_as(gains))
    gains = gains[:, 0, 0]
    assert 0.8 <= gains.min() < 0.82
    assert 1.18 < gains.max() <= 1.2
    assert gains.mean() == pytest.approx(1, abs=0.03)


def test_lead_dropout():
    ones = {"array": np.ones((12, 500), np.float32), "sampling_rate": 250}
    batch = augmented(ones, 200, lead_dropout=0.3)
    assert "ecg_lead_mask" not in batch
    kept = batch["ecg_values"].mean(-1)
    assert set(kept.flatten().tolist()) == {0.0, 1.0}
    assert kept.mean() == pytest.approx(0.7, abs=0.03)
    assert (augmented(ones, 100, lead_dropout=0.99)["ecg_values"].mean(-1).sum(1) == 1).float().mean() > 0.8
    assert augmented(ones, 100, lead_dropout=0.99)["ecg_values"].flatten(1).any(1).all()  # one is always kept


def test_lead_dropout_of_a_model_that_knows_missing_leads():
    """They are missing, but for limb leads that two others give."""
    processor = tiny_processor(missing_leads="zeros")
    batch = augmented(row("a")["ecg"], 200, processor, lead_dropout=0.5)
    mask = batch["ecg_lead_mask"]
    assert torch.equal(mask, batch["ecg_values"].any(-1))
    assert mask[:, 6:].float().mean() == pytest.approx(0.5, abs=0.05)
    both = mask[:, 0] & mask[:, 1]
    assert 0.15 < both.float().mean() < 0.35
    assert mask[both, :6].all()


def test_augmentations_are_independent_options():
    """Each leaves what the others draw first as it is."""
    ecg = row("a")["ecg"]
    noise = augmented(ecg, 20, augment_ecg=True)["ecg_values"]
    both = augmented(ecg, 20, augment_ecg=True, gain_jitter=0.5)["ecg_values"]
    ratio = both / noise
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), atol=1e-3, rtol=1e-3)


def test_augmentation_comes_before_the_shift(monkeypatch):
    """Baseline wander and noise are those of the whole recording; the shift cuts their start off too."""
    ramp = np.tile(np.arange(500, dtype=np.float32), (12, 1)) / 500
    monkeypatch.setattr(augmentation, "augmented_ecg", lambda array, rng: ramp[:, : array.shape[1]])
    values = augmented(row("a")["ecg"], 5, augment_ecg=True, time_shift=0.9)["ecg_values"]
    starts = (500 * values[:, 0, 0]).round().int()
    assert starts.float().mean() > 20
    for one, start in zip(values, starts.tolist(), strict=True):
        np.testing.assert_array_equal(one[:, : 500 - start], ramp[:, start:])


def test_each_notice_is_told_once(caplog, tmp_path):
    """Of all records, whether they are files or not; also where an evaluation comes between."""
    ecg = {"array": np.zeros((13, 500), np.float32), "sampling_rate": 250, "lead_names": [*STANDARD_LEADS, "vx"]}
    np.savez(tmp_path / "a.npz", **ecg | {"lead_names": [*STANDARD_LEADS, "resp"]})
    rows = [row("Is it?", "yes") | {"ecg": one, "record_id": name} for name, one in (("r1", ecg), ("r2", ecg))]
    rows += [row("Is it?", "yes") | {"ecg": str(tmp_path / "a.npz")}]
    collator = ELMCollator(tiny_processor(), gain_jitter=0.1)
    for one in (collator, collator.for_evaluation()):
        one(rows)
    assert caplog.messages == [
        "Left out, as no standard lead has that name: vx. (record r1; not told again)",
        "Left out, as no standard lead has that name: resp. (record without id; not told again)",
    ]


def test_notices_of_what_the_model_reads(caplog):
    """Derived leads and cuts are told once, at the first record that they are about."""
    leads = [lead for lead in STANDARD_LEADS if lead != "aVF"]
    ecg = {"array": np.zeros((11, 750), np.float32), "sampling_rate": 250, "lead_names": leads}
    short = {**ecg, "array": np.zeros((11, 500), np.float32)}
    rows = [
        row("Is it?", "yes") | {"ecg": one, "record_id": name}
        for name, one in (("r1", short), ("r2", ecg), ("r3", ecg))
    ]
    ELMCollator(tiny_processor(truncation="start"))(rows)
    assert caplog.messages == [
        "Derived from I and II: aVF. (record r1; not told again)",
        "Longer than the 2 s that the model reads: a part of it is cut off. (record r2; not told again)",
    ]


def test_for_evaluation():
    options = {"augment_ecg": True, "time_shift": 0.5, "gain_jitter": 0.5, "lead_dropout": 0.5}
    collator = ELMCollator(tiny_processor(), seed=3, max_length=200, perturb="noise", **options)
    rows = [row("Is it?", "yes")]
    plain = ELMCollator(collator.processor, seed=3, perturb="noise")(rows)
    assert_same(collator.for_evaluation()(rows), plain)
    assert not torch.equal(collator(rows)["ecg_values"], plain["ecg_values"])


@pytest.mark.parametrize("representation", PROCESSORS)
def test_what_is_random_depends_on_seed_epoch_and_row_alone(representation):
    processor = PROCESSORS[representation]()
    augment_rgb = representation == "rgb"
    changes = {
        "augment_ecg": True,
        "augment_rgb": augment_rgb,
        "time_shift": 0.2,
        "gain_jitter": 0.1,
        "lead_dropout": 0.1,
    }
    collator = ELMCollator(processor, perturb="noise", seed=3, **changes)
    rows = [row("Is it?", "yes"), row("Is it so?", "no"), row("Is it?", "yes", "Sure?", "no")]
    for one in rows:
        one["ecg"]["sampling_rate"] = processor.feature_extractor.sampling_rate
    together, alone = collator(rows), [collator([one]) for one in rows]
    again = collator(rows[::-1])
    length = alone[1]["input_ids"].shape[1]
    assert torch.equal(together["input_ids"][1, :length], alone[1]["input_ids"][0])
    assert torch.equal(together["input_ids"], again["input_ids"].flip(0))
    key = {"signal": "ecg_values", "symbolic": "input_ids", "rgb": "pixel_values"}[representation]
    if representation != "symbolic":
        assert torch.equal(together[key], torch.cat([batch[key] for batch in alone]))
        assert torch.equal(together[key], again[key].flip(0))
        assert not torch.equal(together[key][0], together[key][1])  # the words differ, the ECG does not
    for changes in ({"epoch": 1}, {"seed": 4}):
        other = replace(collator, **changes)(rows)
        assert other[key].shape != together[key].shape or not torch.equal(other[key], together[key])


def test_persistent_workers_see_the_epoch():
    """They keep the collator that they were started with, so the epoch is in memory that they share."""
    collator = ELMCollator(PROCESSORS["signal"](), gain_jitter=0.5)
    loader = DataLoader([row("Is it?", "yes")], collate_fn=collator, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        collator.epoch.fill_(epoch)
        (batch,) = loader
        epochs.append(batch["ecg_values"])
        assert torch.equal(epochs[-1], collator([row("Is it?", "yes")])["ecg_values"])
    assert not torch.equal(*epochs)


def test_augment_rgb_of_a_batch():
    """The drawing is changed, the size and the words are not, and a record and its drawing are what they would be alone."""
    processor = drawing_processor()
    rows = [row("Is it?", "yes", ecg=False)]
    for index in range(12):
        rows.append(row(f"Is it {index}?", "yes"))
        rows[-1]["ecg"] = make_record(index, 1, sampling_rate=100, seconds=5.0)["ecg"]
    plain = ELMCollator(processor)(rows)
    augmented = ELMCollator(processor, augment_rgb=True)(rows)
    assert augmented.keys() == plain.keys()
    assert augmented["pixel_values"].shape == plain["pixel_values"].shape == (12, 3, 160, 160)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(augmented[name], plain[name])
    differ = (augmented["pixel_values"] != plain["pixel_values"]).flatten(1).any(1)
    assert 2 < differ.sum() < 12


@pytest.mark.parametrize("representation", ["signal", "symbolic", "stacked_signal"])
def test_augment_rgb_of_what_is_not_drawn(representation):
    stacked = tiny_image_processor_elm("vit", "stacked_signal")
    processor = stacked if representation == "stacked_signal" else PROCESSORS[representation]()
    with pytest.raises(ValueError, match=f"--augment_rgb with a model of '{representation}' ECGs; only 'rgb'"):
        ELMCollator(processor, augment_rgb=True)


@pytest.mark.parametrize("representation", PROCESSORS)
def test_max_length(representation):
    processor = PROCESSORS[representation]()
    rows = [row("Is it?", "yes")]
    length = ELMCollator(processor)(rows)["input_ids"].shape[1]
    assert ELMCollator(processor, max_length=length)(rows)["input_ids"].shape[1] == length
    with pytest.raises(ValueError, match=rf"of 1 ECGs and room for \d+ beside its words \(max_length={length - 1}\)"):
        ELMCollator(processor, max_length=length - 1)(rows)
    assert processor.max_length is None
    processor.max_length = length - 1
    with pytest.raises(ValueError, match="max_length="):
        ELMCollator(processor, max_length=length)(rows)


def test_nothing_to_learn():
    with pytest.raises(ValueError, match="no assistant turn to learn from"):
        ELMCollator(tiny_processor())([row("Is it?", "yes"), row("Is it?")])
    processor = tiny_processor()
    processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="The chat template ends an answer with no token"):
        ELMCollator(processor)([row("Is it?", "yes", ecg=False)])


def test_errors_name_the_records():
    far = {"array": np.full((12, 500), 1e4), "sampling_rate": 250}
    chat = [{"role": "user", "content": "Rate?"}, {"role": "assistant", "content": "80"}]
    rows = [{"messages": chat, "ecg": ecg, "record_id": f"r{index}"} for index, ecg in ((7, far), (8, "gone.npz"))]
    with pytest.raises(ValueError, match="In the batch of the records r7: The ECG reaches 10000 mV"):
        ELMCollator(tiny_processor())(rows[:1] * 2)
    with pytest.raises(ValueError, match=r"In the batch of the records r8: .*There is no file gone.npz"):
        ELMCollator(tiny_processor())(rows[1:])


REPORTED = {
    **{family: lambda family=family: tiny_processor(family) for family in FAMILIES},
    "symbolic": tiny_symbolic_processor,
    "rgb": drawing_processor,
    "stacked_signal": lambda: tiny_image_processor_elm("vit", "stacked_signal"),
}
REPORTS = ["Sinus rhythm, é.", "AF. LBBB, rate 120.", "No ECG is left of it."]


@pytest.mark.parametrize("name", REPORTED)
@pytest.mark.parametrize("padding_free", [False, True])
def test_reports_without_a_chat(name, padding_free):
    """Against ids and labels that are put together by hand: one ECG, two of them, none."""
    processor = REPORTED[name]()
    processor.system_prompt = "Be brief."  # of chats
    tokenizer, rate = processor.tokenizer, processor.feature_extractor.sampling_rate
    ecgs = [{"array": 0.1 * row("a", ecg=True)["ecg"]["array"] * scale, "sampling_rate": rate} for scale in (1, 2, 3)]
    rows = [{**row("", report), "ecg": own} for report, own in zip(REPORTS, (ecgs[:1], ecgs[1:], None), strict=True)]
    batch = ELMCollator(processor, train_phase="pretrain", padding_free=padding_free)(rows)

    def words(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ecg_ids = [[processor.ecg_token_id] * processor.num_ecg_tokens] * 3
    if name == "symbolic":
        encoded = [processor.ecg_tokenizer.encode(one.array) for one in processor.feature_extractor.prepare_batch(ecgs)]
        ecg_ids = [tokenizer.convert_tokens_to_ids([f"signal_{number}" for number in ids]) for ids in encoded]
    begin = [] if tokenizer.bos_token is None else [tokenizer.bos_token_id]
    chats = []
    for report, own in zip(REPORTS, (ecg_ids[:1], ecg_ids[1:], []), strict=True):
        prompt = [*begin, *chain(*own), *words("\n")]
        learnt_ids = [*words(report), tokenizer.eos_token_id]
        chats.append((prompt + learnt_ids, [-100] * len(prompt) + learnt_ids))
    if padding_free:
        chats = [tuple([*chain(*parts)] for parts in zip(*chats, strict=True))]
        assert batch["labels"][0, 0] == -100
    for index, (ids, labels) in enumerate(chats):
        assert batch["input_ids"][index, : len(ids)].tolist() == ids
        assert batch["labels"][index, : len(ids)].tolist() == labels
        assert (batch["labels"][index, len(ids) :] == -100).all()
    if name != "symbolic":
        assert len(batch["pixel_values" if name in ("rgb", "stacked_signal") else "ecg_values"]) == 3
    assert processor.system_prompt == "Be brief."  # the processor that is saved is not changed
    assert processor.chat_template != ELMCollator(processor, train_phase="pretrain").processor.chat_template


def test_reports_need_an_end():
    processor = tiny_processor("qwen2_5")
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"--train_phase pretrain: .* has no end-of-text token"):
        ELMCollator(processor, train_phase="pretrain")


def test_reports_without_their_ecgs():
    processor = tiny_processor("llama3")
    batch = ELMCollator(processor, train_phase="pretrain", perturb="only_text")([row("", "Sinus rhythm.")])
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<|begin_of_text|>\nSinus rhythm.<|eot_id|>"
    assert learnt(processor, batch["labels"][0]) == ["Sinus rhythm.<|eot_id|>"]


def test_thinking_that_is_given_is_not_learnt():
    processor = tiny_processor("qwen2_5")
    processor.explicit_thinking = True
    thought = "<think>\nRate 48.\n</think>\n<answer>brady</answer>"
    batch = ELMCollator(processor)([row("Is it?", thought, "And?", thought)])
    assert learnt(processor, batch["labels"][0]) == [f"{thought.removeprefix('<think>' + chr(10))}<|im_end|>"] * 2
    with pytest.raises(
        ValueError, match=r"In the batch of the records r7: The answer 'yes' does not begin with <think>"
    ):
        ELMCollator(processor)([row("Is it?", thought), row("Is it?", "yes") | {"record_id": "r7"}])
