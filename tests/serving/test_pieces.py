from types import SimpleNamespace

import pytest
from hypothesis import given, strategies

from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.serving.pieces import AnswerText, Detokenizer
from helpers import tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def answer_of(pieces: list[str], *args: object) -> str:
    answer = AnswerText(*args)
    return "".join(map(answer.push, pieces)) + answer.end()


@given(strategies.lists(strategies.integers(0, 262), max_size=40), strategies.data())
def test_text_of_tokens_is_that_of_all(processor, ids, data):
    """Bytes at random, of which most are no letters, and special tokens, in runs of any length."""
    cuts = sorted(data.draw(strategies.lists(strategies.integers(0, len(ids)), max_size=5)))
    detokenizer = Detokenizer(processor.tokenizer)
    pieces = [detokenizer.push(ids[start:end]) for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + detokenizer.end() == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_letters_come_whole(processor):
    detokenizer = Detokenizer(processor.tokenizer)
    ids = processor.tokenizer("aé€", add_special_tokens=False)["input_ids"]
    assert [detokenizer.push([token_id]) for token_id in ids] == ["a", "", "é", "", "", "€"]


@given(strategies.lists(strategies.sampled_from(["<t>", "</t>", " ", "\n", "a", "<t", "> b", "b\n\n"]), max_size=8))
@pytest.mark.parametrize(
    ("opening", "given_answer"), [("", ""), ("<t> </t>", ""), ("<t> </t>", "<t>\n"), ("", "<t>\n")]
)
def test_answer_is_that_of_decode_answers(processor, opening, given_answer, pieces):
    fake = SimpleNamespace(answer_opening=opening, given_answer=given_answer, batch_decode=processor.batch_decode)
    ids = processor.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    assert answer_of(pieces, opening, given_answer) == ELMProcessor.decode_answers(fake, [ids])[0]


@pytest.mark.parametrize(
    ("pieces", "answer", "stopped"),
    [
        (["Sinus rhythm. E", "ND and more"], "Sinus rhythm.", True),
        (["Sinus", " EN", "ough"], "Sinus ENough", False),
        (["Sinus E", "N"], "Sinus EN", False),
        (["END"], "", True),
        (["a STOP END"], "a", True),
        (["a EN", "EN", "D"], "a EN", True),
    ],
)
def test_stop_texts(pieces, answer, stopped):
    text = AnswerText(stop=["END", "STOP"])
    assert "".join(map(text.push, pieces)) + text.end() == answer
    assert text.stopped == stopped
