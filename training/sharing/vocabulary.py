"""Rows of the embeddings in the reference's checkpoints: which token each belongs to, and their place in our model."""

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.evaluation.thinking import TAGS
from elm_ecg.training.markdown import public_name
from elm_ecg.training.sharing.checkpoints import Conversion
from elm_ecg.training.sharing.convert_arguments import ECG_TOKENS, ConvertArguments


def _assume_tokens(
    args: ConvertArguments, rows: int, own: dict[str, int], num_signals: int, spare: int | None
) -> list[str]:
    """The tokens that the reference's run has added, by the number of rows; the arguments get the assumption in words.

    Args:
        rows: of the checkpoint's embeddings.
        own: the language model's vocabulary, without added tokens.
        num_signals: ids of the ECG-Byte tokenizer; 0 where ECGs are not symbolic.
        spare: rows of a language model that has more than tokens, which do not tell how many were added.

    Raises:
        ValueError: no phase adds as many, or not that of `--train_phase`.
    """
    ecgs, llm = [ECG_TOKENS] if num_signals else [], public_name(args.llm)
    pretrained = [ELMProcessor.ecg_token, *ecgs]
    # those of its phases sft and rl
    tuned = [ELMProcessor.ecg_token, *(token for token in TAGS if token not in own), *ecgs]
    # older runs of sft add as few as pretrain
    of_phase = [pretrained] if args.train_phase == "pretrain" else [tuned, pretrained]
    counts = {len(tokens) - len(ecgs) + num_signals: tokens for tokens in of_phase}
    if rows <= len(own) and not ecgs:  # of a smaller vocabulary: no row is of an added token
        return pretrained
    if rows - len(own) in counts:
        tokens, why = counts[rows - len(own)], f"the {rows - len(own)} rows behind those of {llm} are"
    elif rows == spare and rows - len(own) > max(counts):
        tokens, why = of_phase[0], f"{llm} has spare rows, which do not tell how many tokens were added: they are"
    else:
        fitting = " or ".join(f"{count} ({' '.join(tokens)})" for count, tokens in sorted(counts.items()))
        raise ValueError(
            f"The embeddings have {rows} rows in the checkpoint, {rows - len(own)} more than the {len(own)} tokens of --llm {args.llm}; "
            f"the reference adds {fitting}. Check --llm{' and --ecg_tokenizer' if ecgs else ''}, or name all tokens that the run added, "
            "in the order of their rows, as --added_tokens."
        )
    order = f", {ECG_TOKENS} in the order of the tokenizer's vocabulary" if ecgs else ""
    args.assumed.append(f"{why} {' '.join(tokens)}, in this order{order}; name others with --added_tokens")
    if tokens == tuned != pretrained and not args.explicit_thinking:
        args.assumed.append("answers begin without a given <think>; give --explicit_thinking if the run had it")
    return tokens


def _check_tokens(
    args: ConvertArguments, tokens: list[str], rows: int, own: dict[str, int], num_names: int, num_ours: int
) -> None:
    """Tokens that the user has named: they must be as many as the rows; `num_ours` are the rows of our model with them."""
    if known := [token for token in tokens if token in own]:
        raise ValueError(
            f"--added_tokens {' '.join(known)}: --llm {args.llm} has it already, so that the run added no row for it; leave it out."
        )
    expected, symbolic = len(own) + num_names, ECG_TOKENS in tokens
    # fewer than the language model's own are of a smaller vocabulary, as many as ours are spare ones
    if (rows < expected and (rows > len(own) or symbolic)) or (rows > expected and rows != num_ours):
        raise ValueError(
            f"The embeddings have {rows} rows in the checkpoint, and --llm {args.llm} with {' '.join(tokens)} needs {expected}; check "
            f"--llm{' and --ecg_tokenizer' if symbolic else ''}, or name all tokens that the run added, in order, as --added_tokens."
        )


def _same_head(args: ConvertArguments, part: Conversion, names: tuple[str, str]) -> None:
    """Of tied weights a checkpoint may hold either, or both; gives the part both."""
    present = [part.tensors[name] for name in names if name in part.tensors]
    if len(present) == 2 and not torch.equal(*present):
        raise ValueError(f"The checkpoint's head is not its embeddings, which --llm {args.llm} ties; check --llm.")
    if present:
        part.tensors |= dict.fromkeys(names, present[0])
        part.missing = [name for name in part.missing if name not in names]


def fit_vocabulary(
    args: ConvertArguments,
    model: ELMForConditionalGeneration,
    processor: ELMProcessor,
    part: Conversion,
    ecg_ids: list[int],
) -> None:
    """Adds the run's tokens to tokenizer and model, and gives embeddings and head of the checkpoint the rows of ours.

    Rows that the checkpoint does not have stay as they are in the base model.

    Args:
        model, processor: with the tokens that every ELM of ours has.
        part: the weights of the language model under our names, changed in place.
        ecg_ids: all ids of the ECG-Byte tokenizer in the order of the run's vocabulary; none where ECGs are not symbolic.

    Raises:
        ValueError: its rows are not those of the tokens, or it has a head of its own where ours is tied.
    """
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    keys = (f"{embeddings}.weight", "lm_head.weight")
    if model.config.tie_word_embeddings:
        _same_head(args, part, keys)
    theirs = {key: part.tensors[key] for key in keys if key in part.tensors and part.tensors[key].ndim == 2}
    if not theirs:
        return  # missing, or of another shape: errors of their own
    counts = {key: len(tensor) for key, tensor in theirs.items()}
    rows, first_added = counts[next(iter(counts))], processor.ecg_token_id
    if set(counts.values()) != {rows}:
        raise ValueError(f"Embeddings and head have {counts} rows in the checkpoint; expected as many of both.")
    vocabulary = processor.tokenizer.get_vocab()
    own = {token: token_id for token, token_id in vocabulary.items() if token_id < first_added}
    num_rows = len(model.state_dict()[keys[0]])
    spare = num_rows if num_rows > len(vocabulary) else None
    tokens = args.added_tokens or _assume_tokens(args, rows, own, len(ecg_ids), spare)
    signals = [f"signal_{ecg_id}" for ecg_id in ecg_ids]
    names = [name for token in tokens for name in (signals if token == ECG_TOKENS else [token])]
    # normal tokens, as a model's answer is decoded without special ones
    others = [token for token in tokens if token != ECG_TOKENS]
    processor.tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in others])
    num_ours = max(num_rows, len(processor.tokenizer))
    _check_tokens(args, tokens, rows, own, len(names), num_ours)
    if num_ours > num_rows:
        # theirs replace the new rows; ours would leave out those of ECGs
        PreTrainedModel.resize_token_embeddings(model, num_ours, mean_resizing=False)
    ids, current = processor.tokenizer.get_vocab(), model.state_dict()
    places = {ids[name]: place for place, name in enumerate(names, start=len(own)) if name in ids and place < rows}
    for key, tensor in theirs.items():
        if tensor.shape[1:] == current[key].shape[1:]:  # else an error of its own, with all shapes
            part.tensors[key] = _rows_of_ours(tensor, current[key], places)
    if rows < num_ours:
        args.assumed.append(
            f"the vocabulary of the checkpoint has {rows} rows; the other {num_ours - rows} of {num_ours} are those of "
            f"{public_name(args.llm)}"
        )


def _rows_of_ours(theirs: Tensor, ours: Tensor, places: dict[int, int]) -> Tensor:
    """[our vocabulary, width], in the order of our ids; `places` are rows of theirs by our ids."""
    fitted = ours.clone()  # rows that the checkpoint lacks stay as they are
    fitted[: len(theirs)] = theirs[: len(ours)].to(ours.dtype)
    fitted[list(places)] = theirs[list(places.values())].to(ours.dtype)
    return fitted
