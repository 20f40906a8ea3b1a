import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_families import FAMILIES, FUYU, tiny_llm

from asking import REPRESENTATIONS, chats, collect, make, predicted, prompt_of, text_of
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import NotFiniteError
from elm_ecg.training.serving.engine import EngineDownError, Prompt, SamplingOptions
from elm_ecg.training.serving.transformers_engine import TransformersEngine
from helpers import tiny_processor


def run(engine: TransformersEngine, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Does the work while the engine runs."""

    async def running() -> Any:
        await engine.start()
        try:
            return await work()
        finally:
            await engine.close()

    return asyncio.run(running())


def engine_of(representation: str = "signal", family: str = "llama3", **settings: Any) -> TransformersEngine:
    model, processor = make(representation, family)
    return TransformersEngine(model, processor.tokenizer, **settings)


@pytest.mark.parametrize(
    ("representation", "family"), [*((name, "llama3") for name in REPRESENTATIONS), ("signal", "gemma2")]
)
def test_answers_are_those_of_elm_predict(representation, family):
    """Alone, among others that come and go, and from what was read before; a window of 32 tokens cannot be cut."""
    model, processor = make(representation, family)
    asked = [
        chat
        for chat in chats(2.0 if representation == "signal" else 5.0)
        if family != "gemma2" or chat[0]["role"] != "system"
    ]
    expected = predicted(model, processor, asked, 12)
    assert len(set(expected)) > len(asked) / 2
    engine = engine_of(representation, family, max_batch_size=4)
    prompts = [prompt_of(processor, chat) for chat in asked]
    options = SamplingOptions(max_new_tokens=12)

    async def work() -> Any:
        alone = [await collect(engine, prompts[0], options)]
        at_once = await asyncio.gather(*(collect(engine, one, options, 0.005 * i) for i, one in enumerate(prompts)))
        whole = replace(options, stream=False)
        return alone, at_once, await asyncio.gather(*(collect(engine, one, whole) for one in prompts))

    alone, at_once, again = run(engine, work)
    assert text_of(alone[0][0]) == expected[0]
    for answers in (at_once, again):
        assert [text_of(choices[0]) for choices in answers] == expected
    cached = [choices[0][0].num_cached for choices in again]
    assert cached == ([0] * len(asked) if family == "gemma2" else [len(prompt.input_ids) - 1 for prompt in prompts])
    assert all(len(choices[0]) <= 2 for choices in again)


def test_drawn_answers_depend_on_their_seed_alone():
    _, processor = make()
    first, *others = [prompt_of(processor, chat) for chat in chats()]
    engine = engine_of()
    drawn = SamplingOptions(max_new_tokens=10, temperature=1.0, top_p=0.9, seed=7, n=3)

    async def work() -> Any:
        alone = await collect(engine, first, drawn)
        beside = [collect(engine, one, replace(drawn, seed=None, n=1, temperature=0.5)) for one in others]
        among, *_ = await asyncio.gather(collect(engine, first, drawn), *beside)
        two = await collect(engine, first, replace(drawn, n=2))
        cold = await collect(engine, first, replace(drawn, temperature=1e-9))
        greedy = await collect(engine, first, SamplingOptions(max_new_tokens=10))
        return [[text_of(pieces) for pieces in answers] for answers in (alone, among, two, cold, greedy)]

    alone, among, two, cold, greedy = run(engine, work)
    assert alone == among
    assert alone[:2] == two
    assert len(set(alone)) == 3
    assert set(cold) == set(greedy)


def test_what_is_told_of_tokens():
    model, processor = make()
    prompt = prompt_of(processor, chats()[1])
    engine = engine_of()

    async def work() -> Any:
        (pieces,) = await collect(engine, prompt, SamplingOptions(max_new_tokens=6, top_logprobs=2))
        text = text_of(pieces)
        stop = text[2:4]
        (stopped,) = await collect(engine, prompt, SamplingOptions(max_new_tokens=6, stop=(stop,)))
        return pieces, text, stop, stopped

    pieces, text, stop, stopped = run(engine, work)
    assert pieces[-1].finish_reason == "length"
    assert sum(piece.num_tokens for piece in pieces) == 6
    logprobs = [one for piece in pieces for one in piece.logprobs]
    assert len(logprobs) == 6
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt.input_ids])).logits[0, -1].log_softmax(-1)
    assert [value for _, value in logprobs[0].top] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)
    expected[model.generation_config.suppress_tokens] = -torch.inf  # a place of an ECG is likeliest, and not written
    assert logprobs[0].logprob == pytest.approx(expected.max().item(), abs=1e-4)
    assert text_of(stopped) == text[: text.index(stop)].rstrip()
    assert stopped[-1].finish_reason == "stop"


def test_who_goes_away_frees_the_place():
    _, processor = make()
    prompt = prompt_of(processor, chats()[0])
    engine = engine_of(max_batch_size=1)
    long = replace(prompt, stop_token_ids=frozenset())

    async def work() -> str:
        pieces = engine.generate(long, SamplingOptions(max_new_tokens=5000))
        await anext(pieces)
        waits = engine.generate(long, SamplingOptions(max_new_tokens=5000))
        waiting = asyncio.ensure_future(anext(waits))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await pieces.aclose()
        (answer,) = await asyncio.wait_for(collect(engine, prompt, SamplingOptions(max_new_tokens=3)), 10)
        return text_of(answer)

    expected = predicted(*make(), chats()[:1], 3)
    assert [run(engine, work)] == expected


def test_numbers_that_are_none_are_of_one_answer_alone():
    model, processor = make()
    asked = chats()
    broken, whole = prompt_of(processor, asked[0]), prompt_of(processor, asked[2])
    broken = replace(broken, ecg_inputs={"ecg_values": broken.ecg_inputs["ecg_values"] * float("nan")})
    engine = engine_of()

    async def work() -> Any:
        options = SamplingOptions(max_new_tokens=5)
        return await asyncio.gather(*(collect(engine, one, options) for one in (broken, whole)), return_exceptions=True)

    fault, answer = run(engine, work)
    assert isinstance(fault, NotFiniteError)
    assert text_of(answer[0]) == predicted(model, processor, [asked[2]], 5)[0]


def test_a_failure_is_told_and_gone_when_the_model_works_again(monkeypatch):
    _, processor = make()
    engine = engine_of()
    prompt, options = prompt_of(processor, chats()[0]), SamplingOptions(max_new_tokens=5)
    broken = asyncio.Event()
    monkeypatch.setattr("elm_ecg.training.serving.transformers_engine.SECONDS_BETWEEN_TRIALS", 0.05)
    forward, expected = type(engine.model).forward, predicted(*make(), chats()[:1], 5)

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(engine.model), "forward", fail)

    async def work() -> Any:
        broken.set()
        with pytest.raises(EngineDownError, match="has failed while it wrote"):
            await collect(engine, prompt, options)
        assert not await engine.healthy()
        with pytest.raises(EngineDownError, match="tried again"):
            await collect(engine, prompt, options)
        broken.clear()
        while not await engine.healthy():
            await asyncio.sleep(0.02)
        return text_of((await collect(engine, prompt, options))[0])

    assert [run(engine, work)] == expected


# one of each kind of memory: whole, windows, a state, a state and experts
FIRST = ("llama", "gemma4", "qwen3_5", "jamba")


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [family if family in FIRST else pytest.param(family, marks=pytest.mark.minutes) for family in FAMILIES]
)
def test_language_models_of_every_family(family, tmp_path):
    """Whatever they keep of what they have read: windows, states, or nothing in some layers."""
    tiny_llm(family).save_pretrained(tmp_path / "llm")
    processor = tiny_processor("default", sampling_rate=100)
    ecg_id = processor.ecg_token_id
    model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
        tmp_path / "llm", ecg_token_id=ecg_id, **FUYU
    ).eval()
    with torch.no_grad():
        for parameter in model.model.connector.parameters():
            parameter.normal_(std=0.5)
    ecg, generator = [ecg_id] * 4, torch.Generator().manual_seed(0)
    prompts = [
        Prompt([*ids, 6], {"ecg_values": torch.randn(number, 12, 500, generator=generator)} if number else {})
        for ids, number in [
            ([*ecg, 7, 8, *ecg], 2),
            ([11, 12], 0),
            ([14, *ecg, *range(20, 80)], 1),
            ([14, *ecg], 1),
            ([3], 0),
        ]
    ]
    engine = TransformersEngine(model, processor.tokenizer, max_batch_size=3)

    async def work() -> list[str]:
        asked = enumerate(prompts)
        each = (collect(engine, one, SamplingOptions(6 + 3 * i), 0.01 * i) for i, one in asked)
        return [text_of(choices[0]) for choices in await asyncio.gather(*each)]

    expected = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.input_ids])
        options = {"max_new_tokens": 6 + 3 * number, "do_sample": False, "repetition_penalty": 1.0, "eos_token_id": []}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **prompt.ecg_inputs)
        expected += processor.decode_answers(output[:, ids.shape[1] :])
    assert run(engine, work) == expected
