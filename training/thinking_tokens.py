"""`--thinking_tokens`: the tags of answers that reason as one token each, with rows of their own in the embeddings and the head."""

import re
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.evaluation.thinking import TAGS


def add_thinking_tokens(tokenizer: Any) -> list[str]:
    """Adds the tags that a tokenizer lacks, and gives them. They are not special: what a model writes of them stays in the text."""
    known = tokenizer.get_vocab()
    new = [tag for tag in TAGS if tag not in known]
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in new])
    return new


def thinking_token_ids(processor: ELMProcessor) -> list[int]:
    """Ids of the tags that are tokens."""
    known = processor.tokenizer.get_vocab()
    return [known[tag] for tag in TAGS if tag in known]


@torch.no_grad()
def add_rows(model: ELMForConditionalGeneration, processor: ELMProcessor, tags: list[str]) -> None:
    """Gives new tags of the tokenizer rows in embeddings and head: the mean of the rows of what a tag is made of, `<`, `think` and `>`.

    So they are the same for every seed, as the base of an adapter has to be.
    """
    if not tags:
        return
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(tags)
    if max(ids) >= model.config.text_config.vocab_size:
        # ours would leave out rows of ids of ECGs
        PreTrainedModel.resize_token_embeddings(model, max(ids) + 1, mean_resizing=False)
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight, head.weight, *([] if head.bias is None else [head.bias])]
    for tag, token_id in zip(tags, ids, strict=True):
        pieces = re.findall(r"</?|\w+|>", tag)
        parts = [part for piece in pieces for part in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        for table in tables:
            table[token_id] = table[parts].float().mean(0).to(table.dtype)
