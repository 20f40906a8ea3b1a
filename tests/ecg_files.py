"""Small ECG files of the formats that libraries write."""

import base64
import io
import json
import struct
from pathlib import Path

import edfio
import h5py
import numpy as np
import pydicom
import scipy.io
from pydicom.dataset import Dataset, FileMetaDataset

LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
COUNTS = np.random.default_rng(0).integers(-900, 900, (12, 100)).astype(np.int16)


def npy_bytes(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npz_bytes(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def mat_bytes(compressed: bool = False, **variables: object) -> bytes:
    stream = io.BytesIO()
    scipy.io.savemat(stream, variables, do_compression=compressed)
    return stream.getvalue()


def mat_73_bytes(compression: str | None = None, **variables: object) -> bytes:
    """A file as MATLAB's -v7.3 writes it: HDF5 behind 512 bytes, dimensions in reverse, texts as numbers, structs as groups."""
    stream = io.BytesIO()

    def write(group: h5py.Group, name: str, value: object) -> None:
        if isinstance(value, dict):
            group.create_group(name).attrs["MATLAB_class"] = np.bytes_("struct")
            for field, part in value.items():
                write(group[name], field, part)
            return
        is_text = isinstance(value, str)
        array = np.array([list(value.encode("latin-1"))], np.uint16) if is_text else np.atleast_2d(value)
        data = group.create_dataset(name, data=array.T, compression=compression)
        data.attrs["MATLAB_class"] = np.bytes_(
            "char" if is_text else {"f8": "double", "f4": "single"}.get(array.dtype.str[1:], "int16")
        )

    with h5py.File(stream, "w", userblock_size=512) as file:
        for name, value in variables.items():
            write(file, name, value)
    text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan  1 00:00:00 2024 HDF5 schema 1.00 .".ljust(124)
    return text + b"\0\2IM" + stream.getvalue()[128:]


def hdf5_bytes(tracings: np.ndarray) -> bytes:
    """A file as CODE publishes them, without ids; tracings [records, samples, leads]."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file.create_dataset("tracings", data=tracings, compression="gzip")
    return stream.getvalue()


def edf_signal(label: str, unit: str = "uV", rate: int = 100, counts: np.ndarray = COUNTS[0]) -> edfio.EdfSignal:
    """One count is one unit, as in the file of PTB-XL's record 17."""
    return edfio.EdfSignal(
        counts.astype(float), rate, label=label, physical_dimension=unit, physical_range=(-32768, 32767)
    )


def edf_bytes(*signals: edfio.EdfSignal, **options: object) -> bytes:
    stream = io.BytesIO()
    edfio.Edf(signals, **options).write(stream)
    return stream.getvalue()


def code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodeMeaning = value, meaning
    return item


def dicom_group(counts: np.ndarray, leads: list[tuple[str, str]], unit: str = "uV", dtype: str = "<i2") -> Dataset:
    group = Dataset()
    group.WaveformOriginality, group.SamplingFrequency = "ORIGINAL", 250
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = counts.shape
    group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
    group.ChannelDefinitionSequence = []
    for lead in leads:
        channel = Dataset()
        channel.ChannelSourceSequence, channel.ChannelSensitivityUnitsSequence = [code(*lead)], [code(unit, "")]
        channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor, channel.ChannelBaseline = 2.5, 2, 10
        group.ChannelDefinitionSequence.append(channel)
    group.add_new("WaveformData", "OW", counts.T.astype(dtype).tobytes())
    return group


def dicom_bytes(*groups: Dataset, little_endian: bool = True) -> bytes:
    dataset, stream = Dataset(), io.BytesIO()
    dataset.file_meta = FileMetaDataset()
    syntax = pydicom.uid.ExplicitVRLittleEndian if little_endian else pydicom.uid.ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.9.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    dataset.PatientID, dataset.PatientSex, dataset.PatientAge = "P7", "F", "042Y"
    dataset.WaveformSequence = list(groups)
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def mfer_definition(tag: int, value: bytes, channel: int | None = None) -> bytes:
    """A tag, the length and the value of MFER; of lengths above 127 their number of bytes stands first."""
    size = bytes([len(value)]) if len(value) < 128 else b"\x84" + struct.pack(">I", len(value))
    return bytes([tag]) + (b"" if channel is None else bytes([channel])) + size + value


def mfer_bytes(counts: np.ndarray = COUNTS[:2], lead_codes: tuple[int, ...] = (1, 2), more: bytes = b"") -> bytes:
    """A file of ISO 22077-1: little endian, 250 Hz, 2.5 uV a count, one block for each lead; `more` comes before the samples."""
    parts = [
        (0x40, b"MFR Standard 12 leads ECG".ljust(32)),
        (0x01, b"\1"),
        (0x02, b"\1\5\0"),
        (0x08, struct.pack("<H", 1)),
    ]
    parts += [(0x82, b"P7"), (0x83, struct.pack("<BHHBB", 42, 0, 1980, 1, 2)), (0x84, b"\2"), (0x17, b"Maker^ECG-1^^")]
    parts += [(0x85, struct.pack("<H5BHH", 2022, 11, 22, 9, 10, 0, 0, 0)), (0x11, b"HPF=0.05"), (0x11, b"LPF=150")]
    # unit, exponent, mantissa: 0 and 1 Hz, 0 and 1 V
    parts += [(0x0B, struct.pack("<BbH", 0, 0, 250)), (0x0C, struct.pack("<BbH", 0, -7, 25)), (0x0A, b"\0")]
    parts += [
        (0x12, struct.pack("<h", -32768)),
        (0x04, struct.pack("<I", counts.shape[1])),
        (0x05, bytes([len(counts)])),
    ]
    parts += [(0x06, b"\1")]
    leads = [
        mfer_definition(0x3F, mfer_definition(0x09, bytes([code, 0])), lead) for lead, code in enumerate(lead_codes)
    ]
    content = b"".join([*(mfer_definition(*part) for part in parts), *leads, more])
    return content + mfer_definition(0x1E, counts.astype("<i2").tobytes()) + b"\x80\0"


def kardia_bytes(counts: np.ndarray = COUNTS[:2], **changes: object) -> bytes:
    """A recording of AliveCor's API at 300 Hz, 500 nV a count; `changes` are of the raw signal, the filtered one is zeros."""
    names = ("leadI", "leadII", "leadIII", "AVR", "AVL", "AVF")
    raw = {"frequency": 300, "mainsFrequency": 60, "amplitudeResolution": 500, "numLeads": len(counts)}
    raw["samples"] = dict(zip(names, counts.tolist(), strict=False))
    enhanced = {**raw, "samples": {name: [0] * counts.shape[1] for name in raw["samples"]}}
    record = {"id": "abc", "patientID": "P7", "duration": 30000, "heartRate": 60, "recordedAt": "2022-11-22T09:10:00Z"}
    record |= {"algorithmDetermination": "normal", "deviceInfo": {"hardwareType": "triangle"}}
    return json.dumps(record | {"data": {"raw": raw | changes, "enhanced": enhanced}}).encode()


def eli_bytes(leads: dict[str, np.ndarray] | None = None, **changes: object) -> bytes:
    """XML of an ELI recorder at 250 Hz, 400 counts a millivolt; `changes` are other attributes of its channels."""
    leads = dict(zip(LEADS, COUNTS[:2], strict=False)) if leads is None else leads
    channels = ""
    for name, lead in leads.items():
        attributes = {"BITS": 16, "FORMAT": "SIGNED", "UNITS_PER_MV": 400, "SAMPLE_FREQ": 250, "DURATION": len(lead)}
        attributes |= {"ENCODING": "BASE64", "OFFSET": 0, "NAME": name, **changes}
        attributes.setdefault("DATA", base64.b64encode(lead.astype("<i2").tobytes()).decode())
        channels += "<CHANNEL " + " ".join(f'{key}="{value}"' for key, value in attributes.items()) + "/>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ECG ACQUISITION_TIME="20221122091000" AGE="42" AGE_UNITS="YEARS" NUM_QRS="9">'
        '<SUBJECT ID="P7" GENDER="Female"/><SOURCE TYPE="STD-12" MANUFACTURER="Mortara" MODEL="ELI250" LOW_PASS_FILTER="150"/>'
        '<AUTOMATIC_INTERPRETATION><STATEMENT TEXT="SINUS RHYTHM" REASON=""/></AUTOMATIC_INTERPRETATION>'
        f'<TYPICAL_CYCLE BITS="16" FORMAT="SIGNED" ENCODING="BASE64"><TYPICAL_CYCLE_CHANNEL NAME="I" DATA="AAAAAA=="/>'
        f"</TYPICAL_CYCLE>{channels}</ECG>"
    ).encode()


def write_wfdb(folder: Path, lines: list[str], **files: bytes) -> Path:
    """A record r with the header `lines` and the signal files NAME.dat."""
    for name, content in files.items():
        (folder / f"{name}.dat").write_bytes(content)
    (folder / "r.hea").write_text("\n".join(lines) + "\n")
    return folder / "r.hea"


# small whole files of each format
WHOLE = {
    "npy": npy_bytes(COUNTS / 1000),
    "dict": npy_bytes({"ecg": COUNTS / 1000, "target_sf": 250, "report": "sinus rhythm"}),
    "npz": npz_bytes(array=COUNTS, sampling_rate=500, lead_names=LEADS, unit="uV"),
    "edf": edf_bytes(*(edf_signal(lead) for lead in LEADS), data_record_duration=0.5),
    "dicom": dicom_bytes(dicom_group(COUNTS, [("", lead) for lead in LEADS])),
    "mfer": mfer_bytes(COUNTS, (1, 2, 61, 62, 63, 64, 3, 4, 5, 6, 7, 8)),
    "kardia": kardia_bytes(COUNTS[:6]),
    "eli": eli_bytes(dict(zip(LEADS, COUNTS, strict=True))),
    "mat": mat_bytes(ECG={"sex": "Male", "age": 52, "data": COUNTS / 1000}),
    "compressed mat": mat_bytes(True, feats=(COUNTS / 1000).astype(np.float32), curr_sample_rate=400),
    "mat 7.3": mat_73_bytes("gzip", ECG={"sex": "Male", "age": 52.0, "data": COUNTS / 1000}),
    "hdf5": hdf5_bytes((COUNTS.T / 1000).astype(np.float32)[None]),
    "csv": "\n".join(["time,I,II", *(f"{n / 250:.3f},{n % 7 / 10:.3f},-0.25" for n in range(100))]).encode(),
}
