"""A language model that is small enough to be trained on two CPU cores, with a tokenizer of the texts that it will see."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from elm_ecg.training.files import let_others_read_weights


def save_small_llm(folder: Path, chats: Iterable[list[dict[str, str]]], seed: int, vocab_size: int = 512) -> None:
    """A Llama of 0.5 million random weights with a byte-level BPE tokenizer of at most `vocab_size` tokens, trained on the chats."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that no text is unknown
        show_progress=False,
    )
    # as the default chat template writes them, so that what every turn begins with is a token
    texts = ("".join(f"{turn['role'].title()}: {turn['content']}\n" for turn in chat) for chat in chats)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): a model this narrow learns slowly from 0.02
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    let_others_read_weights(folder)
