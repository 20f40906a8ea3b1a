import collections
import io
import os
import pickle
import pickletools
import struct
import time

import numpy as np
import pytest

from elm_ecg import plain_pickle
from elm_ecg.plain_pickle import _BASIC, _BOUNDED, MAX_OPCODES, Inert, load_plain_pickle

PLAIN = ({byte: chr(byte) for byte in range(300)}, [([97, 98], 256), ([97, 98, 99], 70_000), ([-1], 0)])
NUMPY = {f"numpy._core.multiarray {name}" for name in ("_reconstruct", "scalar")} | {"numpy ndarray", "numpy dtype"}


def load_bounded(content: bytes):
    return load_plain_pickle(content, str, NUMPY, max_opcodes=10_000)


class Evil:
    """Its pickle makes the file `owned` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch owned",)


# each is executed by `pickle.loads`
EVIL = {
    "reduce": pickle.dumps([1, Evil()]),
    "reduce_protocol_0": pickle.dumps([1, Evil()], 0),
    "reduce_protocol_2": pickle.dumps([1, Evil()], 2),
    "as_a_key": pickle.dumps({Evil(): 1}),
    "after_another_value": pickle.dumps(PLAIN)[:-1] + pickle.dumps(Evil())[2:],
    "global": b"cos\nsystem\n(S'touch owned'\ntR.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R.",
    "inst": b"(S'touch owned'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch owned'\no.",
    "newobj": b"\x80\x02cos\nsystem\n(U\x0btouch ownedt\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n\x8c\x0btouch owned\x85}\x92.",
    "build": b"\x80\x02cos\nsystem\n}b.",
    "ext1": b"\x80\x02\x82\x01.",
    "ext2": b"\x80\x02\x83\x01\x00.",
    "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persid": b"Pid\n.",
    "binpersid": b"\x80\x02U\x02idQ.",
    "harmless_class": pickle.dumps(collections.OrderedDict(a=1)),
    "dup": b"\x80\x02]2\x86.",
    "set": pickle.dumps({1, 2}),
    "protocol_0": pickle.dumps(PLAIN, 0),
}
# values that stand twice, and others than dicts, lists, pairs, short whole numbers and strings
MEMO_BOMB = b"\x80\x04" + b"K\x01\x85\x94" + b"".join(b"h" + bytes([n, ord("h"), n]) + b"\x86\x94" for n in range(200))
NOT_BASIC = {
    "memo": pickle.dumps([[PLAIN] * 2]),
    "memo_bomb_as_a_key": MEMO_BOMB + b"}h\x63K\x01s.",
    "bytes": pickle.dumps(b"bytes"),
    "float": pickle.dumps(1.5),
    "none": pickle.dumps(None),
    "long": pickle.dumps(2**80),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_binary_protocol(protocol):
    with io.BytesIO() as file:
        pickler = pickle.Pickler(file, protocol)
        pickler.fast = True  # what stands twice is written out twice
        pickler.dump(PLAIN)
        assert load_plain_pickle(file.getvalue(), int) == PLAIN
    value = {"text": "ä", "numbers": [1, 2.5, 2**70, -3], "others": (None, True, False, (), (1,), (1, 2, 3, 4))}
    value["again"] = value["numbers"]
    if protocol > 2:  # in which bytes call a function
        value["bytes"] = b"bytes"
    assert load_bounded(pickle.dumps(value, protocol)) == value


def test_functions_are_not_called():
    array = load_bounded(pickle.dumps(np.arange(3, dtype="<i2")))
    assert isinstance(array, Inert)
    assert (array.name, array.state[1], array.state[4]) == ("_reconstruct", (3,), b"\0\0\1\0\2\0")
    assert array.state[2].arguments[0] == "i2"
    for function in ("scalar", "_reconstruct"):
        with pytest.raises(ValueError, match=f"it asks for 'numpy._core.multiarray {function}', which could run code"):
            load_plain_pickle(f"\x80\x04cnumpy._core.multiarray\n{function}\n.".encode("latin-1"), str, (), 100)


@pytest.mark.parametrize("name", EVIL | NOT_BASIC)
def test_what_could_run_code_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"it holds \w+ at byte \d+; expected dicts, lists, pairs, whole numbers and strings only"
    ):
        load_plain_pickle((EVIL | NOT_BASIC)[name], int)
    if name in EVIL:
        with pytest.raises(ValueError, match=r"it holds \w+ at byte|it asks for|keys are no strings"):
            load_bounded(EVIL[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["reduce", "global", "stack_global", "inst", "obj"])
def test_those_pickles_are_evil(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(EVIL[name])
    assert (tmp_path / "owned").exists()


def test_a_long_pickle_takes_no_long_time(monkeypatch):
    """16 MiB of pairs in pairs took 8 seconds."""
    assert MAX_OPCODES <= 1_500_000
    monkeypatch.setattr(plain_pickle, "MAX_OPCODES", 10_000)
    assert len(load_plain_pickle(pickle.dumps(list(range(9_000))), int)) == 9_000
    content = b"\x80\x04K\x01" + b"K\x01\x86" * (16 * 2**20 // 3) + b"."
    start = time.process_time()
    with pytest.raises(ValueError, match="it holds more than 10000 opcodes"):
        load_plain_pickle(content, int)
    assert time.process_time() - start < 1


def test_opcodes_that_are_never_read():
    names = {opcode.name for opcode in pickletools.opcodes}
    assert set(_BASIC.split()) < set(_BOUNDED.split()) < names
    assert not {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"} & set(
        _BOUNDED.split()
    )
    assert not {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINGET", "LONG_BINGET", "LONG1"} & set(_BASIC.split())


def test_deep_pairs_do_not_crash():
    # as a key they would be hashed, which exhausts the stack of the process
    deep = b"K\x01" + b"K\x01\x86" * 100_000
    with pytest.raises(ValueError, match="keys are no whole numbers"):
        load_plain_pickle(b"\x80\x04}" + deep + b"K\x01s.", int)
    assert type(load_plain_pickle(b"\x80\x04" + deep + b".", int)) is tuple
    with pytest.raises(ValueError, match="keys are no strings"):
        load_bounded(MEMO_BOMB + b"}h\x63K\x01s.")


def test_number_of_opcodes_is_bounded():
    content = b"\x80\x04" + b"]" * 9_998 + b"."
    assert load_bounded(content) == []
    with pytest.raises(ValueError, match="it holds more than 10000 opcodes"):
        load_bounded(content[:-1] + b"].")


DAMAGED = [
    (b"", "pickle exhausted before seeing STOP"),
    (b"no pickle", "opcode b'n' unknown"),
    (b"\x80\x04.", "its opcodes do not fit together"),
    (b"\x80\x04a.", "its opcodes do not fit together"),
    (b"\x80\x04u.", "its opcodes do not fit together"),
    (b"\x80\x04}s.", "its opcodes do not fit together"),
    (b"\x80\x04\x86.", "its opcodes do not fit together"),
    (b"\x80\x04]K\x01K\x01s.", "sets items of what is no dict"),
    (b"\x80\x04}(K\x01u.", "sets items of what is no dict, or whose keys"),
    (b"\x80\x04}(]K\x01u.", "keys are no"),
    (b"\x80\x04}K\x01a.", "appends to what is no list"),
    (b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"aa", "4294967295"),
]
DAMAGED_BOUNDED = [
    (b"\x80\x04h\x07.", "its opcodes do not fit together"),
    (b"\x80\x04K\x01K\x02\x93.", "asks for 'no name'"),
    (b"\x80\x04K\x01)R.", "calls what is no function"),
    (b"\x80\x04cnumpy\nndarray\n]R.", "calls what is no function"),
    (b"\x80\x04]}b.", "sets the state of a plain value"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED + DAMAGED_BOUNDED)
def test_damaged_pickles(content, message):
    if (content, message) in DAMAGED:
        with pytest.raises(ValueError, match=message):
            load_plain_pickle(content, int)
    with pytest.raises(ValueError, match=message):
        load_bounded(content)


def test_truncated_anywhere():
    content = pickle.dumps({"ecg": np.zeros(3), "rate": np.float32(500), "path": "a"})
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"\w"):
            load_bounded(content[:length])
