"""Answers by a server that speaks vLLM's protocol are the ELM's own, and its faults are told as an engine's."""

import asyncio
import base64
import copy
import io
from collections.abc import Callable, Coroutine
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from standin_vllm import Refused, StandinVLLM

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import NotFiniteError
from elm_ecg.training.serving.engine import EngineDownError, Piece, Prompt, QueueFullError, SamplingOptions
from elm_ecg.training.serving.vllm_engine import VLLMEngine, as_base64, drop_layers, prompt_embeddings
from elm_ecg.training.sharing.export import save_language_model
from helpers import free_port, tiny_elm_config, tiny_llm_config, tiny_processor

RNG = np.random.default_rng(0)
ECGS = [RNG.normal(0, 0.3, (12, 500)).cumsum(1).astype(np.float32) for _ in "12"]
GREEDY = SamplingOptions(max_new_tokens=8)


class Trained:
    """A random ELM whose answers depend on its ECGs, and its language model as `elm export` saves it."""

    def __init__(self, folder: Any) -> None:
        self.processor = tiny_processor("default", sampling_rate=100)
        # the placeholder is in the vocabulary, and likelier than what may be written
        llm = tiny_llm_config("default", self.processor.ecg_token_id + 1, initializer_range=0.3, eos_token_id=1)
        config = tiny_elm_config(llm=llm, ecg_token_id=self.processor.ecg_token_id, num_samples=500)
        torch.manual_seed(0)
        self.model = ELMForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in self.model.model.connector.parameters():
                parameter.normal_(std=0.5)
            rows = self.model.lm_head.weight
            rows[self.processor.ecg_token_id] = 2 * rows[self.tokens(self.prompt(ECGS[0]))[0]]
        save_language_model(self.model, self.processor, folder)
        self.folder = folder

    def prompt(self, *ecgs: np.ndarray, question: str = "Why?") -> Prompt:
        parts = [{"type": "ecg", "ecg": ecg, "sampling_rate": 100, "unit": "mV"} for ecg in ecgs]
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = dict(self.processor.apply_chat_template(chat, **options))
        ids = inputs.pop("input_ids")[0].tolist()
        del inputs["attention_mask"]
        return Prompt(ids, inputs, stop_token_ids=frozenset(self.processor.stop_token_ids))

    def tokens(self, prompt: Prompt, max_new_tokens: int = 8) -> list[int]:
        ids = torch.tensor([prompt.input_ids])
        with torch.inference_mode():
            found: Any = self.model.generate(ids, **prompt.ecg_inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return found[0, ids.shape[1] :].tolist()

    def answer(self, prompt: Prompt, max_new_tokens: int = 8) -> str:
        return self.processor.decode_answers([self.tokens(prompt, max_new_tokens)])[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def server(trained):
    with StandinVLLM(trained.folder) as server:
        yield server


async def answers(engine: VLLMEngine, prompt: Prompt, options: SamplingOptions = GREEDY) -> list[list[Piece]]:
    pieces: list[list[Piece]] = [[] for _ in range(options.n)]
    async for piece in engine.generate(prompt, options):
        pieces[piece.choice].append(piece)
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ask(trained: Trained, url: str, do: Callable[[VLLMEngine], Coroutine], **options: Any) -> Any:
    """What `do` makes of a started engine."""

    async def run() -> Any:
        engine = VLLMEngine(copy.deepcopy(trained.model), trained.processor.tokenizer, url, **options)
        await engine.start()
        try:
            return await do(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_many_at_once_answer_as_the_elm(trained, server):
    prompts = [
        trained.prompt(*ECGS[:number], question=question) for number in range(3) for question in ("Why?", "Is it?")
    ]

    async def all_at_once(engine: VLLMEngine) -> list[str]:
        found = await asyncio.gather(*(answers(engine, prompt) for prompt in prompts * 2))
        return [text_of(pieces) for (pieces,) in found]

    expected = [trained.answer(prompt) for prompt in prompts] * 2
    assert len(set(expected)) == 6
    assert ask(trained, server.url, all_at_once) == expected
    assert server.max_batch > 1
    assert {request["logit_bias"].popitem() for request in server.requests} == {
        (str(trained.processor.ecg_token_id), -100)
    }


def test_the_end_of_an_answer(trained, server):
    prompt = trained.prompt(ECGS[0])
    tokens = trained.tokens(prompt)
    stopping = Prompt(prompt.input_ids, prompt.ecg_inputs, stop_token_ids=frozenset({tokens[4]}))
    at = tokens.index(tokens[4])
    (pieces,) = ask(trained, server.url, lambda engine: answers(engine, stopping))
    assert text_of(pieces) == trained.processor.decode(tokens[:at]).strip()
    assert (pieces[-1].finish_reason, sum(piece.num_tokens for piece in pieces)) == ("stop", at + 1)
    (pieces,) = ask(trained, server.url, lambda engine: answers(engine, prompt))
    assert [piece.finish_reason for piece in pieces] == [None] * 7 + ["length"]
    whole = trained.answer(prompt)
    stop = next(letter for letter in whole[2:] if letter.isprintable())
    options = SamplingOptions(max_new_tokens=8, stop=(stop,))
    (pieces,) = ask(trained, server.url, lambda engine: answers(engine, prompt, options))
    assert text_of(pieces) == whole[: whole.index(stop)].rstrip()
    assert pieces[-1].finish_reason == "stop"


def test_drawn_answers_and_their_logprobs(trained, server):
    prompt = trained.prompt(ECGS[0])
    options = SamplingOptions(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3, n=2, top_logprobs=2)
    first, again = (ask(trained, server.url, lambda engine: answers(engine, prompt, options)) for _ in "12")
    assert first == again
    assert text_of(first[0]) != text_of(first[1])
    likeliest = SamplingOptions(max_new_tokens=8, temperature=1.0, top_p=0.0)
    assert text_of(ask(trained, server.url, lambda engine: answers(engine, prompt, likeliest))[0]) == trained.answer(
        prompt
    )
    one = SamplingOptions(max_new_tokens=1, top_logprobs=3)
    ((piece,),) = ask(trained, server.url, lambda engine: answers(engine, prompt, one))
    with torch.inference_mode():
        logits = trained.model(torch.tensor([prompt.input_ids]), **prompt.ecg_inputs).logits[0, -1]
    values, ids = logits.log_softmax(-1).topk(3)
    (logprob,) = piece.logprobs
    assert [text for text, _ in logprob.top] == [trained.processor.decode([token]) for token in ids]
    assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-4)
    # the likeliest of all is the placeholder, which is never written
    assert logprob.logprob == pytest.approx(values[1].item(), abs=1e-4)
    assert ids[0] == trained.processor.ecg_token_id


def test_whoever_goes_away_frees_the_place(trained, server):
    server.seconds_a_token = 0.02

    async def leave(engine: VLLMEngine) -> str:
        stream = engine.generate(trained.prompt(ECGS[0]), SamplingOptions(max_new_tokens=500))
        first = await anext(stream)
        await stream.aclose()
        for _ in range(200):
            if server.aborted:
                break
            await asyncio.sleep(0.02)
        return first.text

    ask(trained, server.url, leave)
    assert server.aborted == 1


def test_a_server_that_is_down_comes_back(trained, server):
    server.down = True
    prompt = trained.prompt()

    async def wait(engine: VLLMEngine) -> tuple[bool, bool, str]:
        with pytest.raises(EngineDownError, match=r"^The engine does not answer\.$"):
            await answers(engine, prompt)
        before = await engine.healthy()
        server.down = False
        after = await engine.healthy()
        (pieces,) = await answers(engine, prompt)
        return before, after, text_of(pieces)

    assert ask(trained, server.url, wait) == (False, True, trained.answer(prompt))


def test_what_is_told_of_other_faults(trained, server, caplog):
    prompt = trained.prompt()
    server.breaks_after = 2
    with pytest.raises(EngineDownError):
        ask(trained, server.url, lambda engine: answers(engine, prompt))
    assert "the answer ended before its end" in caplog.text
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineDownError, match=r"^The engine does not answer\.$"):
        ask(trained, nobody, lambda engine: answers(engine, prompt))
    assert nobody in caplog.text  # for who runs the server, and not for its clients
    with pytest.raises(EngineDownError):
        ask(trained, server.url, lambda engine: answers(engine, prompt), model_name="other")
    assert "it serves no model other; say with --engine_model which of elm is the language model" in caplog.text


def test_the_key_of_the_server(trained):
    with StandinVLLM(trained.folder, api_key="secret", max_model_len=300) as server:
        prompt = trained.prompt(ECGS[0])
        with pytest.raises(EngineDownError):
            ask(trained, server.url, lambda engine: answers(engine, prompt))

        async def with_key(engine: VLLMEngine) -> tuple[int | None, str]:
            (pieces,) = await answers(engine, prompt)
            return engine.context, text_of(pieces)

        assert ask(trained, server.url, with_key, api_key="secret") == (300, trained.answer(prompt))


def test_a_full_queue_is_told(trained, server, monkeypatch):
    monkeypatch.setattr(server, "rows_of", Mock(side_effect=Refused(429, "full")))
    with pytest.raises(QueueFullError):
        ask(trained, server.url, lambda engine: answers(engine, trained.prompt()))


def test_the_embeddings_are_those_of_the_model(trained):
    prompt = trained.prompt(*ECGS)
    found = prompt_embeddings(trained.model, prompt)
    assert found.shape == (len(prompt.input_ids), 32)
    with torch.inference_mode():
        expected = trained.model(torch.tensor([prompt.input_ids]), **prompt.ecg_inputs).logits
        torch.testing.assert_close(trained.model(inputs_embeds=found.unsqueeze(0)).logits, expected)
    loaded = torch.load(io.BytesIO(base64.b64decode(as_base64(found))), weights_only=True)
    torch.testing.assert_close(loaded, found, rtol=0, atol=0)
    broken = Prompt(prompt.input_ids, {"ecg_values": prompt.ecg_inputs["ecg_values"] * torch.nan})
    with pytest.raises(NotFiniteError):
        prompt_embeddings(trained.model, broken)


@pytest.mark.parametrize("tie", [False, True])
def test_without_its_layers_a_model_makes_the_same_embeddings(tie, trained):
    config = copy.deepcopy(trained.model.config)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = tie
    model = ELMForConditionalGeneration(config).eval()
    prompt = trained.prompt(ECGS[0])
    expected = prompt_embeddings(model, prompt)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    drop_layers(model)
    torch.testing.assert_close(prompt_embeddings(model, prompt), expected, rtol=0, atol=0)
    kept = [*model.get_input_embeddings().parameters(), *model.model.encoder.parameters()]
    kept += [*model.model.connector.parameters()]
    held = [parameter for parameter in model.parameters() if not parameter.is_meta]
    assert {*map(id, held)} == {*map(id, kept)}
    assert sum(parameter.nbytes for parameter in held) < whole


def test_a_language_model_that_reads_more_than_embeddings(trained):
    model = copy.deepcopy(trained.model)
    model.config.text_config.hidden_size_per_layer_input = 8
    with pytest.raises(ValueError, match=r"--engine vllm: the layers of this language model \(llama\) read the ids"):
        VLLMEngine(model, trained.processor.tokenizer, "http://127.0.0.1:1")
