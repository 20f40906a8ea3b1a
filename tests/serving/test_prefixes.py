import torch

from asking import chats, make, prompt_of
from elm_ecg.training.serving import prefixes
from elm_ecg.training.serving.engine import Prompt
from elm_ecg.training.serving.prefixes import Prefixes, written


def keys(length: int) -> list:
    """Keys and values of two layers, of 8 bytes a token each."""
    return [(torch.arange(2.0 * length).view(1, 1, length, 2),) * 2] * 2


def test_what_was_read_is_found_by_tokens_and_ecgs():
    model, processor = make()
    kept = Prefixes(model.config, 10**6)
    one, _, both, more, *_ = (prompt_of(processor, chat) for chat in chats())
    read = kept.read_of(one)
    length = len(one.input_ids)
    kept.keep(written(read, [5, 6]), keys(length + 2))
    cache, same = kept.find(read)  # the last token is to be read
    assert (same, cache.get_seq_length()) == (length - 1, length - 1)
    longer = kept.read_of(Prompt([*one.input_ids, 5, 7, 8], one.ecg_inputs))
    assert kept.find(longer)[1] == length + 1
    begins_alike = kept.find(kept.read_of(more))[1]
    assert length > begins_alike > model.config.num_ecg_tokens
    # with another ECG in the same tokens, another adapter, another client, or the second ECG first
    other = {name: values + 1 for name, values in one.ecg_inputs.items()}
    of_others = [Prompt(one.input_ids, one.ecg_inputs, **{name: "a"}) for name in ("adapter", "client")]
    for changed in (Prompt(one.input_ids, other), *of_others):
        assert kept.find(kept.read_of(changed))[1] == 0
    swapped = {name: values.flip(0) for name, values in both.ecg_inputs.items()}
    kept.keep(kept.read_of(both), keys(len(both.input_ids)))
    assert kept.find(kept.read_of(Prompt(both.input_ids, swapped)))[1] == 0


def test_room_is_made(monkeypatch):
    config = make()[0].config
    kept = Prefixes(config, 2 * 4 * 80)  # two of ten tokens
    reads = [kept.read_of(Prompt([*range(number, number + 10)])) for number in (1, 20, 40)]
    for read in reads[:2]:
        kept.keep(read, keys(10))
    assert kept.find(reads[0])[1] == 9  # asked for last
    kept.keep(reads[2], keys(10))
    assert [kept.find(read)[1] for read in reads] == [9, 0, 9]
    kept.keep(written(reads[2], [1]), keys(5))  # in place of its beginning
    assert kept.num_bytes == 4 * 80 + 4 * 40
    monkeypatch.setattr(prefixes, "MAX_KEPT", 1)
    kept.keep(reads[1], keys(10))
    assert [kept.find(read)[1] for read in reads] == [0, 9, 0]
    kept.clear()
    assert kept.num_bytes == 0
    assert not Prefixes(config, 0).can_keep
