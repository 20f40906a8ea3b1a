from copy import copy
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import DynamicCache

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.data.loading import load_data, to_chat
from elm_ecg.training.evaluation.answers import Answerer, NotFiniteError
from elm_ecg.training.evaluation.conditions import ASKED, CONDITIONS
from elm_ecg.training.evaluation.progress import Progress
from elm_ecg.training.evaluation.questions import digest, list_questions, other_patients
from foreign_templates import message, of_trl, processor_of
from helpers import (
    TINY_VISION,
    save_tiny_data,
    tiny_ecg_byte,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_llm_config,
    tiny_processor,
    tiny_symbolic_processor,
)

FEW_TOKENS = {"max_new_tokens": 5}


def tiny_elm(family: str = "default", ecg_part: str | None = "merl", **changes: Any) -> Any:
    """A random ELM whose answers depend on the ECG, and its processor."""
    processor = tiny_processor(family, num_ecg_tokens=4 if ecg_part else 0, sampling_rate=100)
    torch.manual_seed(0)
    eos = processor.tokenizer.eos_token_id
    llm = tiny_llm_config(family, len(processor.tokenizer), initializer_range=0.3, eos_token_id=eos)
    if ecg_part is not None:
        changes["ecg_token_id"] = processor.ecg_token_id
    model = ELMForConditionalGeneration(tiny_elm_config(ecg_part, llm=llm, **changes)).eval()
    if model.model.connector is not None:
        with torch.no_grad():
            for parameter in model.model.connector.parameters():
                parameter.normal_(std=0.5)
    return model, processor


def part(text: str | None) -> dict[str, Any]:
    return {"type": "ecg", "text": None} if text is None else {"type": "text", "text": text}


def mixed_rows(num_rows: int, max_ecgs: int = 2, seed: int = 0) -> Dataset:
    """Conversations of one to four questions of many lengths, with no ECG, one or two in any of the turns."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        ecgs, messages = [], []
        for _ in range(rng.integers(1, 5)):
            number = int(rng.integers(0, max_ecgs + 1))
            ecgs += [
                {"array": rng.normal(size=(12, 200)).tolist(), "sampling_rate": 100, "unit": "mV"}
                for _ in range(number)
            ]
            words = "".join(rng.choice(list("abc dé?"), size=rng.integers(1, 20)))
            messages.append({"role": "user", "content": [*[part(None)] * number, part(words)]})
            messages.append({"role": "assistant", "content": [part(str(rng.choice(["yes", "no", "maybe so"])))]})
        rows.append({"messages": messages, "ecg": ecgs, "patient_id": str(index)})
    return Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)


@pytest.fixture(scope="module")
def elm():
    return tiny_elm()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    folder = save_tiny_data(tmp_path_factory.mktemp("data") / "data", train=1, test=7)
    loaded = load_data(DataArguments(data=[str(folder)]), "test")
    assert loaded is not None
    return loaded


def ask(elm: Any, data: Dataset, condition: str = "ecg", **options: Any) -> list[Any]:
    model, processor = elm
    options = {"generation": FEW_TOKENS} | options
    answers, reason = Answerer(model, processor, data, list_questions(data), **options).ask(condition)
    assert reason is None
    return answers


@pytest.mark.minutes
@pytest.mark.slow
def test_200_mixed_samples_in_batches_of_32_and_one_by_one(elm):
    """In float32, greedy: the same answers, whether what turns have in common is read once or for each of them."""
    rows = mixed_rows(80)
    alone = ask(elm, rows, batch_size=1, reuse_prefix=False)
    assert len(alone) >= 200
    assert len(set(alone)) > 50
    assert ask(elm, rows, batch_size=32) == alone
    assert ask(elm, rows, batch_size=32, reuse_prefix=False) == alone


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(
    "ends", [{}, {"eos_token_id": [50, 60, 70, 80]}, {"eos_token_id": [50, 60, 70, 80], "repetition_penalty": 1.3}]
)
def test_rows_that_have_ended_do_not_wait_for_the_others(elm, monkeypatch, reuse, ends):
    """The others go on with the same words as by one call of `generate`, in batches that become smaller."""
    rows, sizes = mixed_rows(8, seed=3), []
    options = {"generation": {"max_new_tokens": 16} | ends, "batch_size": 40, "reuse_prefix": reuse}
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "_is_plain_greedy", lambda self: False)
        at_once = ask(elm, rows, **options)
    dropped = DynamicCache.batch_select_indices

    def counted(self: DynamicCache, indices: torch.Tensor) -> None:
        sizes.append(len(indices))
        dropped(self, indices)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", counted)
    assert ask(elm, rows, **options) == at_once
    assert len(set(sizes)) > 1
    assert len(set(at_once)) > 5


@pytest.mark.parametrize("option", [{"min_length": 3}, {"do_sample": True}])
def test_what_another_call_would_write_otherwise_is_written_in_one(elm, data, monkeypatch, option):
    calls = []
    generate = type(elm[0]).generate
    monkeypatch.setattr(type(elm[0]), "generate", lambda self, **given: calls.append(1) or generate(self, **given))
    ask(elm, data.select([0]), generation=FEW_TOKENS | option)
    assert len(calls) == len(list_questions(data.select([0])))


@pytest.mark.parametrize("score", ["generation", "likelihood"])
def test_an_ecg_is_encoded_once_for_all_conditions(elm, data, score):
    """With the same answers as if it were encoded each time; a record of zeros is one ECG."""
    model, processor = elm
    questions = list_questions(data)
    candidates = None if score == "generation" else [["yes", "no"]] * len(questions)
    options = {"generation": {"max_new_tokens": 2, "num_beams": 2}, "batch_size": 7, "candidates": candidates}
    kept, anew = (Answerer(model, processor, data, questions, **options) for _ in range(2))
    anew._features = None
    for condition in CONDITIONS:
        (found, _), (expected, _) = kept.ask(condition), anew.ask(condition)
        assert found == (expected if candidates is None else [pytest.approx(one, abs=1e-5) for one in expected])
    assert kept._features.computed == 7 + 1 + 7  # the records, zeros, and noise in the place of each
    assert kept._features.found > 7


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "gemma2"])
def test_the_prefix_is_reused_with_every_template(family, monkeypatch):
    elm = tiny_elm(family)
    if family == "gemma2":
        elm[0].config.text_config.sliding_window = 4096  # else its chats do not fit the half of it
        for layer in elm[0].model.language_model.layers:
            layer.self_attn.sliding_window = None
    rows = mixed_rows(8, seed=1)
    alone = ask(elm, rows, batch_size=1, reuse_prefix=False)
    reads: list[int] = []
    prefill = Answerer._prefill
    monkeypatch.setattr(Answerer, "_prefill", lambda *args, **kwargs: reads.append(1) or prefill(*args, **kwargs))
    assert ask(elm, rows, batch_size=8) == alone
    assert reads


def test_a_sliding_window_is_not_stretched_by_padding(monkeypatch):
    """Padding between turns would take places in it, so nothing is reused."""
    elm = tiny_elm("gemma2")
    monkeypatch.setattr(Answerer, "_prefill", lambda *args, **kwargs: pytest.fail("a prefix was reused"))
    ask(elm, mixed_rows(4), batch_size=4)


def test_a_sliding_window_is_not_stretched_by_what_rows_begin_with():
    """Nor by that, a long first question and a long second one, each of another row, though two conversations of any row would fit."""
    model, processor = tiny_elm("gemma2")
    rng = np.random.default_rng(0)
    records = {
        name: [{"array": rng.normal(size=(12, 200)).tolist(), "sampling_rate": 100, "unit": "mV"}] for name in "abc"
    }
    asked = [("a", "x" * 70 + end, "y") for end in "1234"] + [
        ("b", "x", "y"),
        ("b", "x" + "z" * 70, "y"),
        ("c", "x", "y" * 70),
    ]
    rows = []
    for name, *questions in asked:
        messages: list[dict] = []
        for question in questions:
            content = [part(None)] * (not messages) + [part(question)]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": [part("no")]}]
        rows.append({"messages": messages, "ecg": records[name], "record_id": name})
    data = Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)
    candidates = [["yes", "no"]] * 2 * len(rows)
    answerer = Answerer(model, processor, data, list_questions(data))
    read = answerer.read(answerer.batches[0], CONDITIONS["ecg"])
    window = 2 * max(len(row.prompts[-1].input_ids) for row in read)
    model.config.text_config.sliding_window = window
    model.model.language_model.layers[0].self_attn.sliding_window = window
    alone = ask((model, processor), data, candidates=candidates, batch_size=1, reuse_prefix=False)
    together = ask((model, processor), data, candidates=candidates)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-4)


def test_a_template_that_rewrites_what_was_said(elm, monkeypatch):
    """Where a turn is written otherwise when another follows, every prompt is read by itself."""
    _, processor = elm
    template = processor.chat_template.replace(
        "{%- for message in messages -%}", "{{- messages | length -}}{%- for message in messages -%}", 1
    )
    monkeypatch.setattr(processor, "chat_template", template)
    rows = mixed_rows(6)
    assert ask(elm, rows, batch_size=6) == ask(elm, rows, batch_size=1, reuse_prefix=False)


@pytest.mark.parametrize("condition", ASKED)
def test_a_batch_answers_as_one_by_one(elm, data, condition):
    model, processor = elm[0], copy(elm[1])
    processor.system_prompt = "Be brief."
    together = ask((model, processor), data, condition, batch_size=7)
    assert together == ask((model, processor), data, condition, batch_size=1, reuse_prefix=False)


def test_conditions_differ_and_the_random_ones_by_their_seed(elm, data):
    answers = {condition: ask(elm, data, condition) for condition in ASKED}
    assert len({tuple(texts) for texts in answers.values()}) == len(ASKED)
    for condition, texts in answers.items():
        assert (ask(elm, data, condition, seed=1) != texts) == CONDITIONS[condition].random


def test_swapped_is_the_other_patients_ecg(elm, data):
    others = other_patients([(patient,) for patient in data["patient_id"]], 0)
    plain = data.with_format(None)
    swapped = Dataset.from_list(
        [{**row, "ecg": plain[int(other)]["ecg"]} for row, other in zip(plain, others, strict=True)]
    ).with_format("numpy", columns=["ecg"], output_all_columns=True)
    assert ask(elm, swapped) == ask(elm, data, "swapped")


def rows_about_records(num_records: int = 2, num_questions: int = 4) -> Dataset:
    """Several rows about each record, which do not follow each other; the first record is compared with another in each of its rows."""
    rng = np.random.default_rng(1)
    names = [f"record {number}" for number in range(num_records)]
    ecgs = {
        name: [
            {"array": rng.normal(size=(12, 200)).tolist(), "sampling_rate": 100, "unit": "mV"}
            for _ in range(2 if name == names[0] else 1)
        ]
        for name in names
    }
    rows = []
    for question in range(num_questions):
        for name in names:
            content = [*[part(None)] * len(ecgs[name]), part("And now, what is it " + "then " * question + "?")]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [part("no")]}]
            rows.append({"messages": messages, "ecg": ecgs[name], "record_id": name, "patient_id": name})
    return Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)


@pytest.mark.parametrize("condition", ["ecg", "zeroed", "noise", "left_out"])
def test_what_rows_about_a_record_begin_with_is_read_once(elm, condition):
    (model, _), rows, read = elm, rows_about_records(), []
    alone = ask(elm, rows, condition, batch_size=1, reuse_prefix=False)
    candidates = [["yes", "no", "maybe"]] * len(rows)
    likelihoods = ask(elm, rows, condition, candidates=candidates, batch_size=1, reuse_prefix=False)
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        found = ask(elm, rows, condition, candidates=candidates, batch_size=6)
        shared, read[:] = sum(read), []
        assert ask(elm, rows, condition, batch_size=6) == alone
        read.clear()
        ask(elm, rows, condition, candidates=candidates, batch_size=6, reuse_prefix=False)
    finally:
        hook.remove()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(likelihoods), rtol=0, atol=1e-4)
    if condition == "noise":  # which differs by row
        assert shared == sum(read)
    else:
        assert shared < 0.7 * sum(read)
    assert condition != "ecg" or len(set(alone)) > 4


def test_rows_that_are_the_same_are_left_a_token_each(elm):
    rows = rows_about_records(num_questions=1)
    rows = concatenate_datasets([rows, rows, rows])
    assert ask(elm, rows, batch_size=6) == ask(elm, rows, batch_size=1, reuse_prefix=False)


def test_rows_about_a_record_whose_first_turn_has_no_ecg(elm):
    rng, rows = np.random.default_rng(0), []
    ecg = [{"array": rng.normal(size=(12, 200)).tolist(), "sampling_rate": 100, "unit": "mV"}]
    for question in ("Why", "How"):
        messages = []
        for content in ([part("What will you be shown?")], [part(None), part(question)]):
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": [part("no")]}]
        rows.append({"messages": messages, "ecg": ecg, "record_id": "0"})
    data = Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)
    assert ask(elm, data) == ask(elm, data, batch_size=1, reuse_prefix=False)


def test_a_model_that_asks_for_no_cache(elm, monkeypatch):
    """As after training with gradient checkpointing: what was read is kept all the same."""
    for rows in (rows_about_records(), mixed_rows(3)):
        expected = ask(elm, rows)
        with monkeypatch.context() as patch:
            patch.setattr(elm[0].generation_config, "use_cache", False)
            assert ask(elm, rows) == expected


def test_questions_about_a_record_stand_in_one_batch(elm):
    rows = rows_about_records(num_records=3)
    batches = Answerer(*elm, rows, list_questions(rows), batch_size=4).batches
    records = [{rows[index]["record_id"] for (index,) in batch} for batch in batches]
    assert records == [{"record 0"}, {"record 1"}, {"record 2"}]


def test_likelihoods_are_those_of_the_whole_text(elm):
    """Against one forward pass over each prompt with each candidate behind it."""
    model, processor = elm
    rows = mixed_rows(6)
    questions = list_questions(rows)
    names = ["yes", "no", "maybe so"]
    candidates = [names[: 2 + index % 2] for index in range(len(questions))]
    found = {
        size: ask(elm, rows, batch_size=size, candidates=candidates, reuse_prefix=reuse)
        for size, reuse in ((1, False), (6, True), (4, False))
    }
    for index, question in enumerate(questions):
        for place, name in enumerate(candidates[index]):
            chat = to_chat(rows[question.row])[: question.turn]
            chat.append({"role": "assistant", "content": [{"type": "text", "text": name}]})
            batch = processor.apply_chat_template(
                [chat],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                return_tensors=None,
                processor_kwargs={"padding": True},
            )
            batch.convert_to_tensors("pt")
            # of the last turn: a token a byte, the space before them and the end behind
            said = batch.pop("assistant_masks")[0].nonzero()[-len(name) - 2 :, 0]
            with torch.inference_mode():
                logs = model(**batch).logits[0, :-1].log_softmax(-1)
            expected = logs[said - 1].gather(1, batch["input_ids"][0, said, None]).sum()
            for answers in found.values():
                assert answers[index][place] == pytest.approx(float(expected), abs=2e-3)
    assert all(len(row) == len(names) for row, names in zip(found[6], candidates, strict=True))


def test_likelihoods_in_bfloat16_are_not_rounded_by_the_head(data):
    model, processor = tiny_elm()
    model.to(torch.bfloat16)
    questions = list_questions(data)
    scores = [ask((model, processor), data, candidates=[["yes", "no"]] * len(questions))]
    model.lm_head.float()  # the same weights: a head that computes in float32 anyway
    scores.append(ask((model, processor), data, candidates=[["yes", "no"]] * len(questions)))
    assert scores[0] == scores[1]


def test_batches_do_not_tell_the_right_answer(elm, data):
    """They are made by length, but not that of the answer which is asked for: rounding differs by batch."""

    def batches(answers: list[str]) -> list[list[int]]:
        rows = data.with_format(None)
        chats = [[{"role": "user", "content": "Fast?"}, {"role": "assistant", "content": a}] for a in answers]
        asked = Dataset.from_list([{**row, "messages": chat} for row, chat in zip(rows, chats, strict=True)])
        return Answerer(*elm, asked, list_questions(asked)).batches[0]

    assert batches(["yes", "no", "maybe so", "no", "no", "yes", "no"]) == batches(["no"] * 7)


def test_sampled_answers_do_not_depend_on_what_came_before(elm, data, tmp_path, monkeypatch):
    options = {"generation": {**FEW_TOKENS, "do_sample": True, "temperature": 2.0}, "batch_size": 2}
    answers = ask(elm, data, **options)
    torch.manual_seed(5)
    assert ask(elm, data, **options) == answers
    assert ask(elm, data, seed=1, **options) != answers
    questions = list_questions(data)
    progress = Progress(tmp_path, "key")
    whole = Answerer(*elm, data, questions, **options)
    first = [index for row in whole.batches[0] for index in row]
    progress.begin([])
    progress.add(f"ecg 0 {digest(whole.batches)}", 0, [answers[index] for index in first])
    asked: list[int] = []
    answer = Answerer.answer_batch
    monkeypatch.setattr(Answerer, "answer_batch", lambda self, *args: asked.append(args[2]) or answer(self, *args))
    assert Answerer(*elm, data, questions, **options).ask("ecg", progress)[0] == answers
    assert 0 not in asked


def test_an_answer_stops_at_a_text(elm, data):
    rows = data.select(range(4))
    whole = ask(elm, rows)
    text = next(letter for answer in whole for letter in answer[1:-1] if letter.isascii() and letter.isalpha())
    cut = ask(elm, rows, generation=FEW_TOKENS | {"stop_strings": [text]})
    assert cut == [answer[: answer.index(text) + 1] if text in answer else answer for answer in whole]
    assert cut != whole


def test_beams(elm):
    rows = mixed_rows(5)
    options = {"generation": {**FEW_TOKENS, "num_beams": 3}}
    assert ask(elm, rows, batch_size=5, **options) == ask(elm, rows, batch_size=1, **options)
    assert ask(elm, rows, batch_size=5, **options) != ask(elm, rows)


@pytest.mark.minutes
@pytest.mark.slow
def test_compiled_answers_are_the_same(elm, data):
    rows, options = data.select([0]), {"generation": {"max_new_tokens": 3}}
    answers = ask(elm, rows, **options)
    model, processor = tiny_elm()
    model.model.compile(dynamic=True, backend="eager")
    assert ask((model, processor), rows, **options) == answers


def test_a_text_only_model_is_shown_no_ecg(data):
    elm = tiny_elm(ecg_part=None)
    answers = {condition: ask(elm, data, condition) for condition in ASKED}
    assert len({tuple(texts) for texts in answers.values()}) == 1


def test_symbolic_ecgs(data):
    """Their zeros are a text too; noise cannot be compressed, and where it does not fit the context the reason is told."""
    processor = tiny_symbolic_processor("default", tiny_ecg_byte(across_leads=False), {"lead_names": ["I", "V1"]})
    torch.manual_seed(0)
    size = len(processor.tokenizer)
    llm = tiny_llm_config("default", size, max_position_embeddings=4096, initializer_range=0.3, eos_token_id=1)
    config = tiny_elm_config(None, llm=llm, representation="symbolic", num_leads=2)
    elm = (ELMForConditionalGeneration(config).eval(), processor)
    answers = {condition: ask(elm, data, condition) for condition in ASKED}
    assert len({tuple(texts) for texts in answers.values()}) == len(ASKED)
    assert answers["ecg"] == ask(elm, data, batch_size=1, reuse_prefix=False)

    def longest(condition: str) -> int:
        answerer = Answerer(*elm, data, list_questions(data))
        rows = answerer.read(answerer.batches[0], CONDITIONS[condition])
        return max(len(prompt.input_ids) for row in rows for prompt in row.prompts)

    assert longest("noise") > longest("ecg")
    processor.max_length = longest("ecg") + 1
    found, reason = Answerer(*elm, data, list_questions(data), generation=FEW_TOKENS).ask("noise")
    assert found == []
    assert reason is not None
    assert "Nothing is cut in silence" in reason


def test_drawn_ecgs(data, monkeypatch):
    processor = tiny_image_processor_elm("vit", lead_names=["I", "II", "V1"])
    torch.manual_seed(0)
    config = tiny_image_elm_config(
        "vit", llm=tiny_llm_config("llama3", len(processor.tokenizer), initializer_range=0.3)
    )
    config.ecg_token_id = processor.ecg_token_id
    elm = (ELMForConditionalGeneration(config).eval(), processor)
    assert TINY_VISION
    shown: list[torch.Tensor | None] = []
    prefill = Answerer._prefill

    def watch(*args, **kwargs):
        if args[3] is None:  # the first turn
            shown.append(args[4].get("encoder_features"))
        return prefill(*args, **kwargs)

    monkeypatch.setattr(Answerer, "_prefill", watch)
    answers = {condition: ask(elm, data, condition) for condition in ("ecg", "zeroed", "swapped", "left_out")}
    ecg, zeroed, swapped, left_out = shown  # all rows are a batch
    assert left_out is None
    assert ecg is not None
    assert zeroed is not None
    assert swapped is not None
    assert torch.equal(ecg.unique(dim=0), swapped.unique(dim=0))
    assert len(ecg.unique(dim=0)) == len(data)
    assert all(not torch.equal(own, other) for own, other in zip(ecg, swapped, strict=True))
    assert len(zeroed.unique(dim=0)) == 1
    assert answers["ecg"] == ask(elm, data, batch_size=1, reuse_prefix=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("phi3_5", "yes<|end|>"),  # not the end of text that it writes behind the last turn
        ("qwen3_training", "<think>\n\n</think>\n\nyes<|im_end|>"),
        ("smolvlm", " yes<end_of_utterance>"),
    ],
)
def test_the_tokens_of_a_candidate(name, expected):
    """They are what is learnt of an answer."""
    processor = processor_of(of_trl(name))
    answerer = Answerer(tiny_elm(ecg_part=None)[0], processor, Dataset.from_list([]), [])
    chat = [message("user", "Is it?")]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert processor.tokenizer.decode(answerer._suffix("yes", chat, prompt)) == expected


@pytest.fixture
def thinking(elm):
    model, processor = elm
    processor = copy(processor)
    processor.explicit_thinking = True
    return model, processor


def thinking_rows(num_rows: int) -> Dataset:
    """Conversations of two questions; every third answers the first without thinking."""
    rows = []
    for index in range(num_rows):
        thought = "<think>\nSo.\n</think>\n<answer>no</answer>" if index % 3 else "no"
        turns = [("user", "Is it" * (1 + index)), ("assistant", thought), ("user", "And?"), ("assistant", thought)]
        ecg = {
            "array": np.random.default_rng(index).normal(size=(12, 200)).tolist(),
            "sampling_rate": 100,
            "unit": "mV",
        }
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns], "ecg": ecg})
    return Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)


def test_a_model_that_thinks_is_given_the_opening(thinking):
    """In every turn, after right answers that think or do not; the answers have it back."""
    rows = thinking_rows(6)
    alone = ask(thinking, rows, batch_size=1, reuse_prefix=False)
    assert alone == ask(thinking, rows, batch_size=4)
    assert all(answer.startswith("<think>\n") for answer in alone if answer)
    answerer = Answerer(*thinking, rows, list_questions(rows))
    (read,) = answerer.read([[2, 3]], CONDITIONS["ecg"])
    assert read.nested
    for prompt in read.prompts:
        assert thinking[1].decode(prompt.input_ids).endswith("<think>\n")


def test_candidates_of_a_model_that_thinks(thinking):
    model, processor = thinking
    rows = thinking_rows(2).select([1])
    names = [f"<think>\nSo.\n</think>\n<answer>{word}</answer>" for word in ("no", "yes")]
    found = ask(thinking, rows, candidates=[names, names])
    chat = [*to_chat(rows[0])[:3], {"role": "assistant", "content": [{"type": "text", "text": names[1]}]}]
    batch = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    mask = batch.pop("assistant_masks").bool()
    with torch.no_grad():
        scores = model(**batch).logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    last = mask[:, 1:].clone()
    last[:, : int((mask[:, 1:] & ~mask[:, :-1]).nonzero()[-1, 1])] = False  # of the second answer alone
    assert found[1][1] == pytest.approx(float(scores[last].sum()), abs=1e-3)
    with pytest.raises(ValueError, match="The candidate 'yes' does not begin with <think>"):
        ask(thinking, rows, candidates=[["yes", "no"]] * 2)


def test_a_model_without_a_chat_template(elm, data, monkeypatch):
    model, processor = elm
    monkeypatch.setattr(processor, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        Answerer(model, processor, data, list_questions(data))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_nan_has_no_answers(elm, value, monkeypatch):
    """Neither written ones nor chosen ones; nor is it taken for noise that does not fit."""
    model, processor = elm
    rows = mixed_rows(2)
    questions = list_questions(rows)
    compute = type(model).compute_logits

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits = compute(self, *args, **kwargs)
        logits[..., 3] = value
        return logits

    monkeypatch.setattr(type(model), "compute_logits", broken)
    candidates = [["yes", "no"]] * len(questions)
    for choices in (None, candidates):
        answerer = Answerer(model, processor, rows, questions, choices, generation=FEW_TOKENS)
        with pytest.raises(NotFiniteError, match="The model gives NaN or infinity for the scores of tokens"):
            answerer.ask("noise")


def test_tokens_that_are_ruled_out_are_no_fault(elm):
    """They have minus infinity."""
    assert ask(elm, mixed_rows(2), generation={**FEW_TOKENS, "suppress_tokens": [5, 6], "min_new_tokens": 3})
