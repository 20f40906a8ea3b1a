"""Answers by a server that speaks vLLM's protocol are the ELM's own, and its faults are told as an engine's."""

import asyncio
import base64
import copy
import io
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from asking import REPRESENTATIONS, chats, collect, make, predicted, prompt_of, text_of
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.evaluation.answers import NotFiniteError
from elm_ecg.training.serving.engine import EngineDownError, Piece, Prompt, QueueFullError, SamplingOptions
from elm_ecg.training.serving.vllm_engine import VLLMEngine, as_base64, drop_layers, prompt_embeddings
from elm_ecg.training.sharing.export import save_language_model
from helpers import free_port
from standin_vllm import Refused, StandinVLLM

GREEDY = SamplingOptions(max_new_tokens=8)
ASKED = chats()


class Trained:
    """A random ELM whose answers depend on its ECGs, and its language model as `elm export` saves it."""

    def __init__(self, representation: str, folder: Path) -> None:
        model, self.processor = make(representation)
        self.model, self.folder = copy.deepcopy(model), folder
        if representation == "signal":  # its placeholder is likelier than what may be written
            (first,) = self.tokens(self.prompt(0), 1)
            with torch.no_grad():
                rows = self.model.lm_head.weight
                rows[self.processor.ecg_token_id] = 2 * rows[first]
        save_language_model(self.model, self.processor, folder)

    def prompt(self, number: int) -> Prompt:
        """Of one of the chats that are asked: the first is about an ECG, the second about none."""
        return prompt_of(self.processor, ASKED[number])

    def tokens(self, prompt: Prompt, max_new_tokens: int = 8) -> list[int]:
        ids = torch.tensor([prompt.input_ids])
        with torch.inference_mode():
            found: Any = self.model.generate(ids, **prompt.ecg_inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return found[0, ids.shape[1] :].tolist()

    def answer(self, prompt: Prompt) -> str:
        return self.processor.decode_answers([self.tokens(prompt)])[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained("signal", tmp_path_factory.mktemp("llm"))


@pytest.fixture
def server(trained):
    with StandinVLLM(trained.folder) as server:
        yield server


async def answers(engine: VLLMEngine, prompt: Prompt, options: SamplingOptions = GREEDY) -> list[list[Piece]]:
    return await collect(engine, prompt, options)


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


@pytest.mark.parametrize(
    "representation",
    ["signal", "symbolic", *(pytest.param(name, marks=pytest.mark.slow) for name in REPRESENTATIONS[2:])],
)
def test_many_at_once_answer_as_elm_predict(representation, tmp_path):
    trained = Trained(representation, tmp_path)
    asked = chats() if representation == "signal" else chats(5.0)[:3]
    prompts = [prompt_of(trained.processor, chat) for chat in asked]

    async def all_at_once(engine: VLLMEngine) -> list[str]:
        found = await asyncio.gather(*(answers(engine, prompt) for prompt in prompts * 2))
        return [text_of(pieces) for (pieces,) in found]

    expected = predicted(trained.model, trained.processor, asked, 8) * 2
    assert len(set(expected)) == len(asked)
    with StandinVLLM(tmp_path, max_model_len=8192) as server:
        assert ask(trained, server.url, all_at_once) == expected
        assert server.max_batch > 1
        if representation == "signal":
            placeholder = str(trained.processor.ecg_token_id)
            assert {*server.requests[0]["logit_bias"].items()} == {(placeholder, -100)}


def test_the_end_of_an_answer(trained, server):
    prompt = trained.prompt(0)
    tokens = trained.tokens(prompt)
    stopping = Prompt(prompt.input_ids, prompt.ecg_inputs, stop_token_ids=frozenset({tokens[4]}), client="a")
    at = tokens.index(tokens[4])
    (pieces,) = ask(trained, server.url, lambda engine: answers(engine, stopping))
    assert text_of(pieces) == trained.processor.decode(tokens[: at + 1]).strip()  # as it is no special token
    assert server.requests[-1]["cache_salt"] == "a"  # what vLLM keeps of a prompt is of one client
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
    prompt = trained.prompt(0)
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
        stream = engine.generate(trained.prompt(0), SamplingOptions(max_new_tokens=500))
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
    prompt = trained.prompt(1)

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
    prompt = trained.prompt(1)
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
        prompt = trained.prompt(0)
        with pytest.raises(EngineDownError):
            ask(trained, server.url, lambda engine: answers(engine, prompt))

        async def with_key(engine: VLLMEngine) -> tuple[int | None, str]:
            (pieces,) = await answers(engine, prompt)
            return engine.context, text_of(pieces)

        assert ask(trained, server.url, with_key, api_key="secret") == (300, trained.answer(prompt))


def test_an_event_ends_at_a_line_feed_alone(trained, server, monkeypatch):
    """vLLM writes other separators of lines as they are."""
    prompt = trained.prompt(0)
    monkeypatch.setattr(server, "tokenizer", Mock(decode=Mock(return_value="a\u2028b\x85")))
    (pieces,) = ask(trained, server.url, lambda engine: answers(engine, prompt))
    assert text_of(pieces) == trained.answer(prompt)


def test_a_full_queue_is_told(trained, server, monkeypatch):
    monkeypatch.setattr(server, "rows_of", Mock(side_effect=Refused(429, "full")))
    with pytest.raises(QueueFullError):
        ask(trained, server.url, lambda engine: answers(engine, trained.prompt(1)))


def test_the_embeddings_are_those_of_the_model(trained):
    prompt = trained.prompt(2)
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
    prompt = trained.prompt(0)
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
