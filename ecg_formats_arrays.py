"""ECG files of numerical software: NumPy's .npy and .npz, and MATLAB's up to version 7."""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .ecg_formats_common import MAX_SAMPLES, NOTHING_GIVEN, REFERENCE_LEADS, Given, agreed, stated, to_number, to_sex
from .plain_pickle import Inert, load_plain_pickle

# NumPy


def _npy_header(content: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """dtype, shape, whether in Fortran order, and where the data start."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    # version 3 differs from 2 in the names of fields alone, and an ECG has none
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    return dtype, shape, fortran_order, stream.tell()


def _npy_array(content: bytes) -> np.ndarray:
    dtype, shape, fortran_order, start = _npy_header(content)
    if dtype.hasobject:
        raise ValueError(
            "it holds pickled objects, which are not read as loading them runs code. Save the array itself, or an .npz "
            "with array, sampling_rate, lead_names and unit."
        )
    count, present = math.prod(shape), (len(content) - start) // max(1, dtype.itemsize)  # cannot overflow
    if not 0 <= count <= present:  # NumPy's header may hold negative sizes
        raise ValueError(f"it is cut: its shape is {list(shape)}, but it holds only {present} values.")
    return np.frombuffer(content, dtype, count, start).reshape(shape, order="F" if fortran_order else "C")


def read_npy(content: bytes) -> dict[str, Any]:
    """An array of NumPy, or the dict that the reference saves in its place."""
    dtype, shape, _, start = _npy_header(content)
    if dtype.kind == "O" and shape == ():  # what np.save makes of a dict
        return _read_reference_dict(content[start:])
    return {"array": _npy_array(content), "metadata": {"format": "NumPy"}}


# what NumPy's arrays and scalars name in a pickle
_NUMPY_FUNCTIONS = {"numpy dtype", "numpy ndarray"} | {  # the core is _core since NumPy 2
    f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}
# the reference's dict takes about a hundred
_MAX_OPCODES = 10_000


def _pickled_dtype(value: Inert) -> np.dtype:
    code, order = value.arguments[0], value.state[1]  # state: version, byte order, ...
    if not (re.fullmatch("f[248]|[iu][1248]", code) and order in ("<", ">", "|", "=")):
        raise ValueError(f"it holds an array of dtype {code[:20]!r}; expected real numbers.")
    return np.dtype(code).newbyteorder(order)


def _pickled_array(value: Any) -> np.ndarray:
    if not (isinstance(value, Inert) and value.name == "_reconstruct"):
        raise ValueError("its 'ecg' is no NumPy array.")
    _, shape, dtype, fortran_order, data = value.state  # as ndarray.__reduce__ gives it
    return np.frombuffer(data, _pickled_dtype(dtype)).reshape(shape, order="F" if fortran_order else "C")


def _pickled_fact(value: Any) -> Any:
    """A number or a string; None for anything else."""
    if isinstance(value, Inert) and value.name == "scalar":
        dtype, data = value.arguments
        return np.frombuffer(data, _pickled_dtype(dtype))[0].item()
    return value if isinstance(value, (int, float, str)) else None


def _read_reference_dict(content: bytes) -> dict[str, Any]:
    """The reference's `np.save(path, {"ecg": ..., "target_sf": ..., ...})`, without unpickling.

    Leads are not named: the reference writes MIMIC and CODE-15 in its own order, and all else as it comes, which is the
    standard order.
    """
    try:
        outer = load_plain_pickle(content, str, _NUMPY_FUNCTIONS, _MAX_OPCODES)
        (facts,) = outer.state[4]  # of an ndarray: version, shape, dtype, order, list of its objects
        array = _pickled_array(facts["ecg"])
        plain = {name: _pickled_fact(value) for name, value in facts.items()}
    except Exception as error:
        raise ValueError(
            "it holds pickled objects other than the reference's dict of ecg, target_sf, report ..., and loading them "
            "would run code. Save the array itself, or an .npz with array, sampling_rate, lead_names and unit. "
            f"({error})"
        ) from error
    metadata = {name: plain.get(name) for name in ("report", "ecg_path", "npy_path", "original_sf", "segment_len")}
    record = {"array": array, "sampling_rate": plain.get("target_sf"), "unit": "mV"}  # after the reference resampled
    if re.search("mimic|code[-_]?15", f"{metadata['ecg_path']} {metadata['npy_path']}", re.IGNORECASE):
        record["lead_names"] = list(REFERENCE_LEADS)
        metadata["lead_order"] = "of the reference, as its ecg_path or npy_path names MIMIC or CODE-15"
    return {**record, "metadata": {"format": "NumPy, dict of the reference", **stated(**metadata)}}


# keys of an archive beside its array -> how many dimensions they have, their dtypes, and what they are
FACTS = {
    "sampling_rate": (0, "iuf", "one number of hertz"),
    "lead_names": (1, "U", "a list of texts"),
    "unit": (0, "U", "one text"),
}


def as_fact(key: str, array: np.ndarray) -> Any:
    """What an archive says of its array; ValueError where that is of another kind."""
    ndim, kinds, expected = FACTS[key]
    if array.size == 1 and ndim == 0:  # [500] says the same as 500
        array = array.reshape(())
    if array.ndim != ndim or array.dtype.kind not in kinds:
        raise ValueError(f"its {key!r} is an array {list(array.shape)} of {array.dtype}; expected {expected}.")
    if array.dtype.kind == "U" and array.dtype.itemsize:  # four bytes a letter, which may hold any number
        letters = np.ascontiguousarray(array).reshape(-1).view(f"{array.dtype.byteorder}u4")
        if ((letters > 0x10FFFF) | ((letters >= 0xD800) & (letters < 0xE000))).any():
            raise ValueError(f"its {key!r} holds numbers that are no letters of Unicode.")
    return array.tolist()


def read_npz(content: bytes) -> dict[str, Any]:
    """NumPy's archive of one record: `array` or `ecg`, and `sampling_rate`, `lead_names` and `unit` where it has them."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        several = "one record; `elm data build` reads archives of several"

        def member(key: str) -> np.ndarray:
            info = archive.infolist()[names.index(key)]
            # zipfile unpacks the others at one go, however large
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{key!r} is compressed in another way than np.savez_compressed does.")
            if info.file_size > 8 * MAX_SAMPLES:  # 8: bytes of a float64
                raise ValueError(f"{key!r} unpacks to {info.file_size} bytes; at most {8 * MAX_SAMPLES} are read.")
            return _npy_array(archive.read(info))

        array = next((key for key in ("array", "ecg") if key in names), None)
        if array is None:
            first = f"{names[:8]}{' ...' if len(names) > 8 else ''}"
            raise ValueError(f"it holds {first}; expected the key 'array' or 'ecg' [leads, samples] of {several}.")
        record: dict[str, Any] = {key: as_fact(key, member(key)) for key in FACTS if key in names}
        record["array"] = member(array)
    if record["array"].ndim == 3:
        shape = list(record["array"].shape)
        raise ValueError(f"{array!r} has shape {shape}; expected [leads, samples] of {several}.")
    return {**record, "metadata": {"format": "NumPy"}}


# MATLAB 5: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
# not by scipy.io.loadmat: a single damaged byte can make it crash the process

_MAT_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MAT_TEXTS = {4: "utf-16", 16: "utf-8", 17: "utf-16"}
_MAT_COMPRESSED, _MAT_MATRIX = 15, 14
_MAT_STRUCT, _MAT_CHAR = 2, 4
_MAT_NUMBERS = range(6, 16)  # mxDOUBLE_CLASS to mxUINT64_CLASS
_MAX_MAT_FIELD_NAMES = 2**16  # bytes


def _mat_elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The type and the data of one element after the other."""
    position = 0
    while position < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, position)
        start = position + 8
        padded = size if kind == _MAT_COMPRESSED else -(-size // 8) * 8  # to whole 8 bytes, unless packed
        if kind >> 16:  # up to four bytes stand in the tag
            kind, size, start, padded = kind & 0xFFFF, kind >> 16, position + 4, 4
        if start + size > len(content):
            raise ValueError(f"it is cut: an element claims {size} bytes, and {len(content) - start} are left.")
        yield kind, content[start : start + size]
        position = start + padded


def _mat_matrix(content: memoryview, order: str) -> tuple[str, Any]:
    """Name and value of a variable: an array, a string, a dict for a struct of one element; None for all else."""
    elements = _mat_elements(content, order)
    flags, dimensions, name = (data for _, data in (next(elements), next(elements), next(elements)))
    matrix_class = int(np.frombuffer(flags, f"{order}u4")[0])
    shape = tuple(np.frombuffer(dimensions, f"{order}i4").tolist())
    value: Any = None
    if matrix_class & 0xFF in _MAT_NUMBERS and not matrix_class & 0x800:  # complex numbers are no ECG
        kind, data = next(elements)
        value = np.frombuffer(data, order + _MAT_DTYPES[kind]).reshape(shape, order="F")  # kind: as stored
    elif matrix_class & 0xFF == _MAT_CHAR:  # utf-16 alone would take this machine's byte order
        kind, data = next(elements)
        value = str(data, _MAT_TEXTS[kind] + ("" if kind == 16 else "-le" if order == "<" else "-be"))
    elif matrix_class & 0xFF == _MAT_STRUCT and math.prod(shape) == 1:
        (_, length), (_, names) = next(elements), next(elements)
        width = int(np.frombuffer(length, f"{order}i4")[0])  # of each name, filled up with zeros
        if len(names) > _MAX_MAT_FIELD_NAMES:
            raise ValueError(f"it holds a struct with {len(names)} bytes of field names.")
        fields = [bytes(names[start : start + width]).split(b"\0")[0] for start in range(0, len(names), width)]
        value = {
            field.decode("latin-1"): _mat_matrix(data, order)[1] if len(data) else None
            for field, (_, data) in zip(fields, elements, strict=True)
        }
    return str(name, "latin-1"), value


def read_mat(content: bytes, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """MATLAB 5 to 7, as `mat_record` says."""
    order = {b"IM": "<", b"MI": ">"}[content[126:128]]  # the letters MI as a 16-bit number of the file
    limit = 8 * MAX_SAMPLES
    variables: dict[str, Any] = {}
    for kind, data in _mat_elements(memoryview(content)[128:], order):
        if kind == _MAT_COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(data, max(1, limit))  # 0 would be no limit
            if not unpacker.eof:
                raise ValueError(f"a variable is cut, or unpacks to more than {8 * MAX_SAMPLES} bytes.")
            limit -= len(unpacked)  # of all variables together
            kind, data = next(_mat_elements(memoryview(unpacked), order))
        if kind == _MAT_MATRIX:
            name, value = _mat_matrix(data, order)
            variables[name] = value
    return mat_record(variables, given)


# the variables that are read, beside the struct ECG, and the fields of that
MAT_ARRAYS, MAT_FIELDS = ("feats", "curr_sample_rate", "val"), ("data", "age", "sex")
_NO_HEADER = (
    "its matrix holds counts without rate, leads and gain, which the WFDB header beside it states; put NAME.hea into the "
    "same folder"
)


def mat_record(variables: dict[str, Any], given: Given) -> dict[str, Any]:
    """What MATLAB's variables say: those of CPSC 2018 and CODE-15, or the counts `val` of PhysioNet's.

    Args:
        variables: arrays and texts by name; a struct is a dict of these.

    Raises:
        ValueError: it is none of these, or `val`, and the caller does not say what a count is.
    """
    return agreed(_mat_record(variables, given), given)


def _mat_record(variables: dict[str, Any], given: Given) -> dict[str, Any]:
    ecg = variables.get("ECG")
    if isinstance(ecg, dict) and isinstance(ecg.get("data"), np.ndarray):  # CPSC 2018
        age = ecg.get("age")
        return {
            "array": ecg["data"],
            "sampling_rate": 500,  # of the whole data set: the files do not say it
            "unit": "mV",
            "metadata": {
                "format": "MATLAB, CPSC 2018",
                **stated(
                    age=to_number(age.item()) if isinstance(age, np.ndarray) and age.size == 1 else None,
                    sex=to_sex(ecg["sex"]) if isinstance(ecg.get("sex"), str) else None,
                ),
            },
        }
    if isinstance(variables.get("feats"), np.ndarray):  # CODE-15
        rate = variables.get("curr_sample_rate")
        return {
            "array": variables["feats"],
            "sampling_rate": rate.item() if isinstance(rate, np.ndarray) and rate.size == 1 else None,
            "metadata": {"format": "MATLAB, CODE-15"},
        }
    if isinstance(variables.get("val"), np.ndarray):  # as WFDB's wfdb2mat names it
        if given.unit is None:
            raise ValueError(
                f"{_NO_HEADER}, or give unit and sampling_rate (in commands with these options: --unit uV --sampling_rate 500), if a "
                "count is one microvolt."
            )
        return {"array": variables["val"], "metadata": {"format": "MATLAB, val"}}
    raise ValueError(
        f"it holds the variables {sorted(variables)[:8]}; expected the struct ECG of CPSC 2018, feats and curr_sample_rate of "
        "CODE-15, or val."
    )


def is_mat_4(content: bytes) -> bool:
    """Five whole numbers (type, rows, columns, complex, length of the name), and a name that ends with 0."""
    if len(content) < 24:
        return False
    kind, _, _, is_complex, length = struct.unpack("<5I", content[:20])  # 1000 M + 100 O + 10 P + T, of which P varies
    return (
        kind in (0, 10, 20, 30, 40, 50)
        and is_complex < 2
        and 1 < length <= 64
        and content.startswith(b"\0", 19 + length)
    )


def read_mat_4(content: bytes) -> dict[str, Any]:
    """ValueError: such files are the signals of WFDB records, which are read by their headers."""
    raise ValueError(f"{_NO_HEADER}.")
