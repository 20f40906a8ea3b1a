"""The metrics against independent implementations, the papers' examples and what holds of any text; without network."""

import inspect
import itertools
import random
import re
import socket
import string
import sys
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import nltk.corpus
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nltk.corpus import LazyCorpusLoader, WordNetCorpusReader
from nltk.stem import PorterStemmer
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge_score.rouge_scorer import RougeScorer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from elm_ecg.training.files import resource

METRICS = resource("training/evaluation/metrics")
# of words alone, without a file or a model
TEXT_METRICS = ["exact_match", "normalized_match", "token_f1", "bleu4", "rouge_l", "set_f1"]


@pytest.fixture(autouse=True, scope="module")
def no_network():
    def refuse(*args: Any) -> None:
        raise AssertionError(f"a connection to {args[-1]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@cache
def load(name: str) -> evaluate.Metric:
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def compute(name: str, pairs: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    predictions, references = zip(*pairs, strict=True)
    return load(name).compute(predictions=list(predictions), references=list(references), **options)


def save_wordnet(folder: Path, synonyms: list[list[str]]) -> None:
    """WordNet's files with nouns alone (format: wndb(5WN))."""
    folder.mkdir(parents=True)
    for name in WordNetCorpusReader._FILES:
        (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tnoun.Tops\t1\n")
    data, index = "  1 a licence\n", ""  # nltk takes place 0 for no place
    for words in synonyms:
        index += "".join(f"{word} n 1 0 1 0 {len(data):08d}\n" for word in words)
        members = " ".join(f"{word} 0" for word in words)
        data += f"{len(data):08d} 00 n {len(words):02x} {members} 000 | made up\n"
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text(index)


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """A WordNet of two synonyms each, for nltk, which looks them up by their stems: words that are their own."""
    folder = tmp_path_factory.mktemp("nltk_data")
    save_wordnet(folder / "corpora" / "wordnet", [["big", "vast"], ["quick", "fast"], ["fault", "defect"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder)])
        patch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, object()))
        yield


WORDS = [
    "sinus",
    "rhythm",
    "Sinus",
    "RHYTHM",
    "yes",
    "no",
    "none",
    "normal",
    "ECG",
    "left",
    "bundle",
    "branch",
    "block",
    "blocks",
    "blocked",
    "elevation",
    "elevated",
    "the",
    "a",
    "an",
    "The",
    "ST-elevation",
    "T-wave",
    "aVR",
    "V1",
    "(V2)",
    "75",
    "bpm,",
    "axis.",
    "st/t",
    "'paced'",
    "Σημείο",
    "ΟΔΟΣ",
    "große",
    "GROSSE",
    "Übersicht",
    "café",
    "café",
    "心电图",
    "正常。",
    "синусовый",
    "ритм،",
    "नमस्ते",
    "ﬁbrillation",
    "ＷＩＤＥ",
    "«oui»",
    "¿no?",
    "🫀",
    "½",
    "İstanbul",
    "naïve—sic",
    "…",
]


@cache
def generated_pairs() -> list[tuple[str, str]]:
    """500 answers and references: equal, in another order, edited, unlike, empty and very long."""
    rng = random.Random(0)

    def join(words: list[str]) -> str:
        return "".join(word + rng.choice([" "] * 8 + ["  ", ", ", "\n", "\u00a0", "; "]) for word in words)

    pairs = []
    for number in range(500):
        right = [*rng.choices(WORDS, k=rng.choice([1, 1, 2, 3, 5, 8, 20])), rng.choice(["ECG", "心电图", "große"])]
        if number in (7, 250):
            right = rng.choices(WORDS, k=700)
        words = list(right)
        kind = rng.randrange(8)
        if kind == 0:
            rng.shuffle(words)
        elif kind == 1:
            words = rng.choices(WORDS, k=len(words))
        elif kind == 2:
            words = [word.upper() for word in words]
        elif kind in (3, 4, 5):
            words = [rng.choice(WORDS) if rng.random() < 0.3 else word for word in words if rng.random() < 0.9]
        elif kind == 6:
            words = rng.choice([[], [], rng.choices(WORDS, k=2000)]) if number % 4 == 0 else words[: len(words) // 2]
        pairs.append((join(words) or rng.choice(["", " ", "\n"]), join(right)))
    return pairs


def test_generated_pairs_are_of_all_kinds():
    pairs = generated_pairs()
    assert len(pairs) == 500
    assert sum(not prediction.strip() for prediction, _ in pairs) > 5
    assert sum(len(prediction.split()) > 600 for prediction, _ in pairs) > 3
    assert sum(prediction.strip() == reference.strip() for prediction, reference in pairs) > 10
    assert sum(not prediction.isascii() for prediction, _ in pairs) > 200


def test_exact_match():
    result = compute("exact_match", generated_pairs())
    expected = [
        re.sub(r"^\s+|\s+$", "", given) == re.sub(r"^\s+|\s+$", "", right) for given, right in generated_pairs()
    ]
    assert result["samples"] == expected
    assert result["exact_match"] == sum(expected) / 500


def squad_words(text: str) -> list[str]:
    """`normalize_answer` of SQuAD's evaluate-v1.1.py, with the punctuation of WORDS, and its case folded."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(char for char in text if char not in set(string.punctuation + "。،«»¿—"))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def test_normalized_match_and_token_f1_as_squad():
    pairs = generated_pairs()
    matches, f1 = compute("normalized_match", pairs), compute("token_f1", pairs)
    for index, (prediction, reference) in enumerate(pairs):
        given, right = squad_words(prediction), squad_words(reference)
        assert matches["samples"][index] == (given == right)
        left = list(right)
        for word in given:
            if word in left:
                left.remove(word)
        common = len(right) - len(left)
        if common == 0:
            expected = 0.0
        else:
            precision, recall = common / len(given), common / len(right)
            expected = 2 * precision * recall / (precision + recall)
        assert f1["samples"][index] == pytest.approx(expected, abs=1e-12)
    assert matches["normalized_match"] == pytest.approx(np.mean(matches["samples"]))
    assert f1["token_f1"] == pytest.approx(np.mean(f1["samples"]))
    assert 0.1 < matches["normalized_match"] < f1["token_f1"] < 0.9


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("The  sinus rhythm.", "Sinus rhythm", True),
        ("ST-elevation", "stelevation", True),
        ("STRASSE", "straße", True),
        ("cafe\u0301", "café", True),
        ("ﬁbrillation", "fibrillation", True),
        ("1.2 mV", "12 mV", False),
        ("0,12 s.", "0,12 s", True),
        ("-0.5 mV", "0.5 mV", False),
        ("(-0.5)", "-0.5", True),
        ("60-100", "60100", True),
        ("QRS < 120 ms", "QRS > 120 ms", False),
        ("A.", "a", True),
        ("A", "an", False),
        ("the", "A", False),
        ("?", "!", False),
        ("?", "?", True),
        ("", "the", False),
        ("the", "?", False),
    ],
)
def test_normalisation(prediction, reference, same):
    assert compute("normalized_match", [(prediction, reference)])["normalized_match"] == same
    assert (compute("token_f1", [(prediction, reference)])["token_f1"] == 1) == same


@pytest.mark.parametrize("name", [*TEXT_METRICS, "closed_set", "meteor", "bert_score"])
def test_modules_say_what_they_are(name, wordnet):
    """`evaluate` takes the class of the metric, not the one that all of them share, and describes it by its module."""
    metric = load(name)
    assert metric.name == name
    assert metric.description == inspect.getmodule(type(metric)).__doc__
    assert "predictions: [n] answers." in metric.inputs_description
    assert all(f"{part}:" in metric.inputs_description for part in ("references", "samples"))


def test_token_f1_counts_repeated_words():
    assert compute("token_f1", [("no no no yes", "no no")])["token_f1"] == pytest.approx(2 * (2 / 4) / (2 / 4 + 1))


def nltk_bleu(pairs: list[tuple[str, str]]) -> float:
    references = [[reference.split()] for _, reference in pairs]
    predictions = [prediction.split() for prediction, _ in pairs]
    return corpus_bleu(references, predictions, smoothing_function=SmoothingFunction().method1)


def test_bleu4_as_nltk():
    pairs = generated_pairs()
    result = compute("bleu4", pairs)
    assert result["bleu4"] == pytest.approx(nltk_bleu(pairs), abs=1e-12)
    parts = [pairs[start : start + 5] for start in range(0, 500, 5)]
    sums = np.array(result["samples"]).reshape(100, 5, 10).sum(axis=1)
    expected = [nltk_bleu(part) for part in parts]
    np.testing.assert_allclose(load("bleu4").statistic(sums), expected, atol=1e-12)
    assert load("bleu4").statistic(sums.reshape(4, 25, 10)).shape == (4, 25)


@pytest.mark.parametrize(
    "pairs", [[("", "yes")], [("no", "yes")], [("yes", "yes")], [("", "a"), ("a b c d e", "a b c d")]]
)
def test_bleu4_of_few_words_as_nltk(pairs):
    assert compute("bleu4", pairs)["bleu4"] == pytest.approx(nltk_bleu(pairs), abs=1e-12)


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """As the longest increasing run of places (Hunt and Szymanski 1977)."""
    places = defaultdict(list)
    for place, word in enumerate(second):
        places[word].insert(0, place)
    ends: list[int] = []
    for word in first:
        for place in places[word]:
            where = bisect_left(ends, place)
            ends[where : where + 1] = [place]
    return len(ends)


def stems(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).lower()
    words = ["".join(chars) for alnum, chars in itertools.groupby(text, str.isalnum) if alnum]
    return [PorterStemmer().stem(word) if len(word) > 3 else word for word in words]


def test_rouge_l():
    result = compute("rouge_l", generated_pairs())
    for value, (prediction, reference) in zip(result["samples"], generated_pairs(), strict=True):
        given, right = stems(prediction), stems(reference)
        common = longest_common_subsequence(given, right)
        assert value == pytest.approx(2 * common / (len(given) + len(right)), abs=1e-12)
    assert result["rouge_l"] == pytest.approx(np.mean(result["samples"]))


def test_rouge_l_of_english_is_rouge_scores():
    pairs = [
        (ascii(given), ascii(right)) for given, right in generated_pairs() if len(given) < 300 and len(right) < 300
    ]
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)  # of one line, the same run
    expected = [scorer.score(right, given)["rougeLsum"].fmeasure for given, right in pairs]
    np.testing.assert_allclose(compute("rouge_l", pairs)["samples"], expected, atol=1e-12)


def test_rouge_l_of_lins_example():
    """Lin 2004, section 3.1: 3 of 4 words in order, and 2 of 4."""
    pairs = [
        ("police kill the gunman", "police killed the gunman"),
        ("the gunman kill police", "police killed the gunman"),
    ]
    # Lin's words are not stemmed: "kill" and "killed" are no match there
    assert compute("rouge_l", pairs)["samples"] == [1.0, 0.5]
    assert compute("rouge_l", [("police slay the gunman", "police killed the gunman")])["samples"] == [0.75]


# in each group words that METEOR matches: the same, of one stem, or synonyms
MATCHING = [["big", "vast"], ["quick", "fast"], ["fault", "defect"], ["beat", "beats", "beating"], ["block", "blocked"]]
MATCHING += [
    ["wave", "WAVES"],
    ["rhythm"],
    ["心电图"],
    ["ритм"],
    ["große", "Große"],
    ["yes"],
    ["75"],
    ["st"],
    ["x", "X"],
]


def meteor_of(given: list[int], right: list[int]) -> float:
    """Of words each of which matches one other at most, section 2.2 of Banerjee and Lavie 2005."""
    matched = [(place, right.index(word)) for place, word in enumerate(given) if word in right]
    if not matched:
        return 0.0
    precision, recall = len(matched) / len(given), len(matched) / len(right)
    after = set(matched)
    chunks = sum((place - 1, other - 1) not in after for place, other in matched)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / len(matched)) ** 3)


def test_meteor(wordnet):
    rng = random.Random(1)
    numbers = range(len(MATCHING))
    pairs, expected = [], []
    for _ in range(500):
        right = rng.sample(numbers, rng.randint(1, len(MATCHING)))
        given = rng.choice([right, sorted(right), right[1:], rng.sample(numbers, rng.randint(0, len(MATCHING)))])
        texts = [" ".join(rng.choice(MATCHING[word]) for word in words) for words in (given, right)]
        pairs.append((texts[0], texts[1]))
        expected.append(meteor_of(given, right))
    result = compute("meteor", pairs)
    np.testing.assert_allclose(result["samples"], expected, atol=1e-12)
    assert result["meteor"] == pytest.approx(np.mean(expected))
    assert 0.0 in expected


def test_meteor_of_the_papers_example(wordnet):
    """Banerjee and Lavie 2005, section 2.2: six words in two chunks, "the president" and "spoke to the audience"."""
    pair = ("the president spoke to the audience", "the president then spoke to the audience")
    expected = 10 * (6 / 7) / (6 / 7 + 9) * (1 - 0.5 * (2 / 6) ** 3)
    assert compute("meteor", [pair])["meteor"] == pytest.approx(expected)
    assert compute("meteor", [("", "yes"), ("yes", "yes"), ("yes" * 3, "no")])["samples"] == [0, 0.5, 0]
    very_long = " ".join(WORDS * 50)
    assert compute("meteor", [(very_long, very_long)])["meteor"] == pytest.approx(1)


def test_meteor_without_wordnet(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, object()))
    with pytest.raises(FileNotFoundError, match=rf"\({tmp_path}\); get it with `python -m nltk\.downloader wordnet`"):
        evaluate.load(str(METRICS / "meteor"))


@pytest.mark.parametrize(
    ("name", "library"), [("rouge_l", "rouge_score"), ("meteor", "nltk"), ("bert_score", "bert_score")]
)
def test_missing_library(monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"need to install .*{library}"):
        evaluate.load(str(METRICS / name))


TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of a BERT and of a RoBERTa with random weights, whose tokenizers do not say where to cut."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sinus", "rhythm", *string.ascii_lowercase]
    pieces += [f"##{letter}" for letter in string.ascii_lowercase]
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(folder / "bert")
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=40, **TINY)).save_pretrained(folder / "bert")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "Ġn", "no"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    RobertaTokenizer(vocab=vocab, merges=[("Ġ", "n"), ("n", "o")]).save_pretrained(folder / "roberta")
    config = RobertaConfig(vocab_size=len(pieces), max_position_embeddings=40, **TINY)
    RobertaModel(config).save_pretrained(folder / "roberta")
    return {"bert": (folder / "bert", BertModel), "roberta": (folder / "roberta", RobertaModel)}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_bert_score(encoders, kind):
    """Against one text at a time, cosines of its layer's states, and the most similar (Zhang et al. 2020, section 3).

    As in the authors' code, the special tokens can be matched, but are not themselves counted.
    """
    folder, model_class = encoders[kind]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), model_class.from_pretrained(folder).eval()

    def states(text: str) -> torch.Tensor:
        text = text.strip() if kind == "bert" else f" {text.strip()}"  # RoBERTa's words begin with a space
        tokens = tokenizer.encode(text, truncation=True, max_length=38)
        with torch.no_grad():
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2][0]
        return torch.nn.functional.normalize(hidden, dim=-1)

    chosen = slice(0, 300, 6)
    pairs = [*generated_pairs()[chosen], ("no", "normal no"), ("", "no"), ("yes " * 100, "yes " * 101)]
    result = compute("bert_score", pairs, model=str(folder), num_layers=2, batch_size=7, device="cpu")
    expected = []
    for prediction, reference in pairs:
        similar = states(prediction) @ states(reference).T
        precision, recall = similar[1:-1].amax(dim=1).mean(), similar[:, 1:-1].amax(dim=0).mean()
        expected.append(float(2 * precision * recall / (precision + recall)) if prediction.strip() else 0.0)
    np.testing.assert_allclose(result["samples"], expected, atol=1e-5)
    assert result["bert_score"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert result["samples"][-1] == pytest.approx(1)  # both cut at the same place
    other = compute("bert_score", pairs, model=str(folder), num_layers=3, batch_size=7, device="cpu")
    assert other["bert_score"] != pytest.approx(np.mean(expected), abs=1e-5)


def test_bert_score_of_empty_answers_alone(encoders):
    options = {"model": str(encoders["bert"][0]), "num_layers": 1}
    assert compute("bert_score", [("", "yes"), ("\n", "no")], **options)["samples"] == [0, 0]


def test_bert_score_without_a_model_or_layer(encoders, tmp_path):
    folder = str(encoders["bert"][0])
    pairs = [("yes", "yes")]
    with pytest.raises(
        OSError, match=r"BERTScore's model '.*nothing' cannot be loaded; expected the folder or the Hub id"
    ):
        compute("bert_score", pairs, model=str(tmp_path / "nothing"), num_layers=1)
    with pytest.raises(ValueError, match=r"best layer of BERTScore's model .* is not known; give num_layers"):
        compute("bert_score", pairs, model=folder)
    for layer in (0, 4):
        with pytest.raises(ValueError, match=f"num_layers is {layer}; BERTScore's model .* has 1 to 3"):
            compute("bert_score", pairs, model=folder, num_layers=layer)


STATEMENTS = [
    "none",
    "qrs duration",
    "p duration",
    "st/t change",
    "große welle",
    "心电图 正常",
    "q wave",
    "ритм",
    "x, y and z",
]


def written(rng: random.Random, numbers: list[int]) -> str:
    """Statements in another case, with white space, twice, or with a point at the end of the last."""
    texts = [STATEMENTS[number] for number in rng.sample(numbers, len(numbers)) + numbers[: rng.randrange(2)]]
    texts = [
        rng.choice([str, str.upper, str.title])(text).replace(" ", rng.choice([" ", "  ", "\n"])) for text in texts
    ]
    return rng.choice(["; ", ";", " ;\n", ";;"]).join(texts) + rng.choice(["", ".", " ;", ";", " "])


def test_set_f1():
    rng = random.Random(2)
    pairs, sets = [], []
    for _ in range(500):
        right = rng.sample(range(9), rng.randint(1, 6))
        given = rng.choice([right, right[1:], rng.sample(range(9), rng.randint(0, 9))])
        pairs.append((written(rng, given), written(rng, right)))
        sets.append((given, right))
    result = compute("set_f1", pairs)
    for row, sample, (given, right) in zip(result["pairs"], result["samples"], sets, strict=True):
        hits = sum(number in right for number in given)
        precision, recall = (hits / len(given) if given else 0), hits / len(right)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        assert (row["precision"], row["recall"]) == (precision, recall)
        assert row["f1"] == sample == pytest.approx(f1)
        assert row["missed"] == sorted(STATEMENTS[number].casefold() for number in right if number not in given)
        assert row["extra"] == sorted(STATEMENTS[number].casefold() for number in given if number not in right)
    for name, score in (("precision", "precision"), ("recall", "recall"), ("f1", "set_f1")):
        assert result[score] == pytest.approx(np.mean([row[name] for row in result["pairs"]]))


def test_none_is_a_statement():
    result = compute("set_f1", [("none", "None."), ("", "none"), ("none", "p duration"), ("none; p duration", "none")])
    assert result["samples"] == [1, 0, 0, pytest.approx(2 / 3)]
    assert result["pairs"][2]["missed"] == ["p duration"]
    assert result["pairs"][3]["extra"] == ["p duration"]


@pytest.mark.parametrize("labels", [None, ["Yes", "no", "not sure", "心电图", "never"]])
def test_closed_set(labels):
    """The plain definitions, class by class; with the labels given, one of them never occurs."""
    rng = random.Random(3)
    names = ["no", "not sure", "yes", "心电图"] if labels is None else labels
    classes = [0, 1, 2, 3]
    pairs, truth = [], []
    for _ in range(500):
        right = rng.choices(classes, weights=[5, 2, 2, 1])[0]
        given = rng.choice([right, rng.choice(classes), None])
        text = rng.choice(["", "maybe", "yes and no", "yes" * 3000]) if given is None else names[given]
        if rng.randrange(2):
            text = text.upper().replace(" ", "  ")
        pairs.append((f" {text}.", names[right].upper()))
        truth.append((right, given))
    result = compute("closed_set", pairs, labels=labels)
    assert result["labels"] == names
    assert result["closed_set"] == sum(right == given for right, given in truth) / 500
    assert result["samples"] == [[names[right], "(other)" if given is None else names[given]] for right, given in truth]
    recalls, f1s = [], []
    for number, name in enumerate(names):
        hits = sum(right == given == number for right, given in truth)
        occurs, chosen = sum(right == number for right, _ in truth), sum(given == number for _, given in truth)
        row = [sum(pair == (number, other) for pair in truth) for other in [*range(len(names)), None]]
        assert result["confusion_matrix"][number] == row
        figures = result["per_class"][name]
        assert figures["support"] == occurs
        if name == "never":
            assert figures == {"precision": None, "recall": None, "f1": None, "support": 0}
            continue
        precision, recall = hits / chosen, hits / occurs
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall))
        assert figures == {"precision": precision, "recall": recall, "f1": pytest.approx(f1s[-1]), "support": occurs}
    assert result["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert result["macro_f1"] == pytest.approx(np.mean(f1s))


def test_closed_set_with_a_class_that_is_only_given():
    result = compute("closed_set", [("yes", "no"), ("no", "no")], labels=["no", "yes"])
    assert result["per_class"]["yes"] == {"precision": 0, "recall": None, "f1": 0, "support": 0}
    assert result["balanced_accuracy"] == 0.5
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize(
    ("references", "labels", "message"),
    [
        (
            ["yes", "maybe"],
            ["yes", "no"],
            r"reference of pair 1, counted from 0, is 'maybe'; expected one of \['yes', 'no'\]",
        ),
        (["yes", " "], None, r"reference of pair 1, counted from 0, is ' '; expected one of \['yes'\]"),
        (["yes", "no"], ["yes", "no", "No."], "two differ in nothing but"),
    ],
)
def test_closed_set_refuses(references, labels, message):
    with pytest.raises(ValueError, match=message):
        load("closed_set").compute(predictions=["yes", "no"], references=references, labels=labels)


@pytest.mark.parametrize("name", [*TEXT_METRICS, "meteor", "bert_score"])
def test_a_reference_is_never_empty(name, wordnet, encoders):
    options = {"model": str(encoders["bert"][0]), "num_layers": 1} if name == "bert_score" else {}
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match=r"reference of pair 1, counted from 0, .*; leave that pair out"):
            compute(name, [("yes", "yes"), ("", empty)], **options)


# words that can meet, and any text
TEXTS = st.one_of(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), st.text(max_size=20))
REFERENCES = TEXTS.filter(lambda text: text.replace(";", "").strip(" .…\n") and not text.isspace())


@pytest.mark.parametrize("name", [*TEXT_METRICS, "meteor"])
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_holds_of_any_text(name, wordnet, data):
    pairs = data.draw(st.lists(st.tuples(TEXTS, REFERENCES), min_size=1, max_size=6))
    pairs.append(("", pairs[0][1]))
    result = compute(name, pairs)
    samples = np.array(result["samples"])
    score = load(name).statistic if name == "bleu4" else lambda sums: sums / len(pairs)
    assert result[name] == pytest.approx(score(samples.sum(axis=0)), abs=1e-12)
    assert 0 <= result[name] <= 1 + 1e-12
    assert score(samples)[-1] == 0  # the empty answer

    order = data.draw(st.permutations(range(len(pairs))))
    again = compute(name, [pairs[index] for index in order])
    assert again[name] == pytest.approx(result[name], abs=1e-12)
    np.testing.assert_allclose(again["samples"], samples[list(order)], atol=1e-12)


@pytest.mark.parametrize("name", [*TEXT_METRICS, "meteor", "closed_set"])
@given(data=st.data())
def test_the_reference_is_the_best_answer(name, wordnet, data):
    references = data.draw(st.lists(REFERENCES, min_size=1, max_size=6))
    if name == "bleu4":  # which wants four words
        references = [f"{reference} of this one ECG" for reference in references]
    if name == "rouge_l":  # which wants a word
        references = [f"{reference} ECG" for reference in references]
    result = compute(name, [(reference, reference) for reference in references])
    if name == "meteor":
        words = [len(wordpunct_tokenize(reference)) for reference in references]
        np.testing.assert_allclose(result["samples"], [1 - 0.5 / number**3 for number in words])
    else:
        assert result[name] == pytest.approx(1)
