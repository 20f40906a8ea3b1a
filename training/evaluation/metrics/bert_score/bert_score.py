"""BERTScore: F1 of the tokens of an answer and its reference, each matched to the most similar (Zhang et al. 2020).

2 P R / (P + R) of each pair, where P is the mean over the answer's tokens of the highest cosine with a token of the
reference, and R the other way round; tokens are hidden states of an encoder's layer. The score is the mean over the
pairs. By `bert_score`, without idf weights, and not rescaled. Texts are cut at the encoder's longest.

An empty answer scores 0.
"""

from functools import lru_cache
from typing import Any

import bert_score
from bert_score.utils import model2layers
from transformers import AutoConfig, AutoTokenizer

from elm_ecg.training.evaluation.text import ARGUMENTS, TextMetric, require_references

CITATION = """
@inproceedings{zhang2020bertscore,
  title={{BERTScore}: Evaluating Text Generation with {BERT}},
  author={Zhang, Tianyi and Kishore, Varsha and Wu, Felix and Weinberger, Kilian Q. and Artzi, Yoav},
  booktitle={Proceedings of ICLR},
  year={2020}
}
"""
INPUTS = f"""{ARGUMENTS.rstrip()}
    model: folder or Hub id of an encoder and its tokenizer, as roberta-large, which the paper recommends for English.
    num_layers: the layer whose states are compared. None: the one that the paper's authors found best for a model that
        they know by its Hub id.
    batch_size: texts at once.
    device: such as cpu or cuda:0. None: a GPU where there is one.

Returns:
    bert_score: the mean over the pairs.
    samples: [n], the F1 of each pair.

Raises:
    OSError: the model cannot be loaded.
    ValueError: no layer is known, or the model does not have it.
"""


@lru_cache(maxsize=1)  # for the answers of one condition after the other
def load_scorer(model: str, num_layers: int | None, device: str | None) -> bert_score.BERTScorer:
    """The scorer of an encoder's layer; `INPUTS` has its arguments and errors."""
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OSError(
            f"BERTScore's model {model!r} cannot be loaded; expected the folder or the Hub id of an encoder with its "
            f"tokenizer. {error}"
        ) from error
    if num_layers is None and model not in model2layers:
        raise ValueError(f"The best layer of BERTScore's model {model!r} is not known; give num_layers.")
    layer = model2layers[model] if num_layers is None else num_layers
    if not 0 < layer <= config.num_hidden_layers:
        raise ValueError(f"num_layers is {layer}; BERTScore's model {model!r} has 1 to {config.num_hidden_layers}.")
    scorer = bert_score.BERTScorer(model_type=model, num_layers=layer, device=device)
    # its own puts no space before RoBERTa's first word, and cuts nothing where the saved one does not say at what
    # length; positions of RoBERTa begin at 2
    positions = getattr(config, "max_position_embeddings", 514) - 2
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)  # 1e30 where it is not saved
    scorer._tokenizer = tokenizer  # private: BERTScorer takes none
    return scorer


class BERTScore(TextMetric):
    """F1 of the tokens of each pair."""

    def _compute(  # type: ignore[override]  # needs its model
        self,
        predictions: list[str],
        references: list[str],
        model: str,
        num_layers: int | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ) -> dict[str, Any]:
        require_references(references)
        scorer = load_scorer(model, num_layers, device)
        samples = [0.0] * len(predictions)
        answered = [index for index, prediction in enumerate(predictions) if prediction.strip()]
        if answered:
            pairs = ([texts[index] for index in answered] for texts in (predictions, references))
            _, _, f1 = scorer.score(*pairs, batch_size=batch_size)  # precision, recall, F1
            for index, value in zip(answered, f1.tolist(), strict=True):
                samples[index] = value
        return {"bert_score": sum(samples) / len(samples), "samples": samples}
