import json

import pytest
import torch
from safetensors.torch import save_file

from elm_ecg.training.sharing.disclosure import (
    DATES,
    NAMES,
    check_folder,
    check_page,
    check_results,
    check_text,
    check_weights,
    without_local_paths,
)

DATED = [
    "2014-03-12",
    "2014-03-12T10:15:00",
    "2014_03_12",
    "2014.3.2",
    "20140312",
    "20140312T1015",
    "12.3.2014",
    "03/12/14",
]
DATED += [
    "12-MAR-2014",
    "12/Mar/2014",
    "12th March 2014",
    "March 12th, 2014",
    "March 12, 2014",
    "12. März 2014",
    "May 2014",
]
UNDATED = [
    "torch 2.15.0",
    "1.2.3",
    "12/100/2000",
    "grade 2 marked 2000 ms",
    "may 10, 2000 samples",
    "1-may 2000 patients",
]
UNDATED += ["12 decreased, 2014", "in 2014", "sha256:5f848420140312aa", "leads 10/12", "12.5.2014.1", "ids 2014031212"]
NAMED = [
    "DOE^JANE",
    "doe^jane",
    "Müller^Jörg",
    "Patient name: Jane Doe",
    "patient's name = Doe",
    "patient name is Jane Doe",
]
NAMED += [
    "Patientenname: Müller",
    '"last_name": "Doe"',
    "Patient: Jane Doe",
    "Patient: Mr. John Smith",
    "MRN: 12345",
    "MRN AB123",
]
NAMED += ["DOB: 1950-01-02", "date of birth 2.1.1950", "geb. 2.1.1950"]
UNNAMED = [
    "softmax(QK^T/sqrt(d))V",
    "AB^T",
    "V1^2 = I",
    "no MRN: identifiers were removed",
    "patient_name: removed, dob: removed",
]
UNNAMED += [
    "patient names are withheld",
    "the model's name: x",
    "Patient: sinus rhythm",
    "Patient: 65 years",
    "born of",
]


@pytest.mark.parametrize("text", DATED)
def test_dates(text):
    assert DATES.search(f"as on {text}: sinus rhythm")


@pytest.mark.parametrize("text", UNDATED)
def test_no_dates(text):
    assert DATES.search(text) is None


@pytest.mark.parametrize("text", NAMED)
def test_names(text):
    assert NAMES.search(f"x, {text}, y")


@pytest.mark.parametrize("text", UNNAMED)
def test_no_names(text):
    assert NAMES.search(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loaded from /home/jane/models/x", "'/home/jane/models/x', a folder of this machine"),
        (r"C:\Users\jane\x", "a folder of this machine"),
        ("token hf_" + "a" * 34, r"a token or key, hf_aaa\.\.\.: take it out, and revoke it"),
    ],
)
def test_paths_and_tokens(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_text(tmp_path / "README.md", text)
    check_text(tmp_path / "README.md", "https://example.org/home/x, runs/my_elm, hf_notes, on 2026-11-20")


def test_results(tmp_path):
    """Names of data and packages are no dates of patients; what escapes of JSON hide is found."""
    path = tmp_path / "evaluation_results.json"
    results = {"model": "run-2026-11-20", "data": {"names": ["export-2024-03-12"]}, "packages": {"x": "5.1.2025"}}
    path.write_text(json.dumps(results | {"verdict": "run-2026-11-20 on export-2024-03-12 looks at the ECG."}))
    assert check_results(path) == ["export-2024-03-12", "run-2026-11-20"]
    for part, message in (
        ({"verdict": "as in M\N{LATIN SMALL LETTER U WITH DIAERESIS}ller^J\xf6rg"}, r"'Müller\^Jörg'"),
        ({"wrong": [["noise", "ECG of\n2014-03-12"]]}, "'2014-03-12', which may be of a patient"),
        ({"examples": [{"Birth_Date": 3}]}, "holds birth_date, which may name patients"),
    ):
        path.write_text(json.dumps(results | part))
        with pytest.raises(ValueError, match=message):
            check_results(path)
    for content, message in (("[]", "holds a list; expected a JSON object"), ("{", "is not JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            check_results(path)


def test_page(tmp_path):
    style = "<style>a {margin: 1.2.2014}</style><svg d='M 2014-03-12'></svg>"
    check_page(tmp_path, f"{style}<td>my-2014-03-12 data</td>", ["my-2014-03-12 data"])
    for text in ("<td>2014&#45;03-12</td>", "<b>DOE</b>^x DOE^JANE"):
        with pytest.raises(ValueError, match="may be of a patient"):
            check_page(tmp_path, style + text, [])


def test_weights(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    check_weights(tmp_path, ["model-1.safetensors"])
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks model-2\.safetensors, which model\.safetensors\.index\.json names"):
        check_weights(tmp_path, ["model-1.safetensors"])
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is no file of safetensors, or damaged"):
        check_weights(tmp_path, ["model.safetensors"])
    content = (tmp_path / "model-1.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="or damaged"):
        check_weights(tmp_path, ["model.safetensors"])
    with pytest.raises(ValueError, match="no weights in safetensors"):
        check_weights(tmp_path, [])


def test_what_runs_leave_is_left_out(tmp_path):
    names = [
        "seed1/report.html",
        "plot.svg",
        "page.html",
        "notes.txt",
        "emissions.csv",
        "fold1/predictions.jsonl",
        "run.log",
    ]
    contents = {"plot.svg": b"<?xml version='1.0'?>\n<!-- made by x -->\n<svg>", "page.html": b"\n<!DOCTYPE html><p>"}
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(contents.get(name, b"<html>a, b"))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.bin").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    assert check_folder(tmp_path, ["config.json"]) == sorted(names)


@pytest.mark.parametrize(
    "name", ["NOTICE_patients.csv", "LICENSE_old.pt", "train_ecgs.parquet", "data/muse.xml", "ecg.npz", "x.pkl"]
)
def test_what_looks_like_data_or_a_pickle(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    content = b"<?xml version='1.0'?><!DOCTYPE RestingECG SYSTEM 'restecg.dtd'><RestingECG>"
    (tmp_path / name).write_bytes(b"PK\x03\x04" if name == "ecg.npz" else content)
    with pytest.raises(ValueError, match=r"is a pickle|looks like data of patients"):
        check_folder(tmp_path, [])


def test_configurations(tmp_path):
    path = tmp_path / "config.json"
    kept = {"a": {"b": ["owner/name", "/", "</s>"]}, "_name_or_path": "owner/name", "license": "mit"}
    path.write_text(json.dumps(kept))
    assert without_local_paths(path) == path
    local = {"name_or_path": "../llm", "vocab_file": "/home/jane/vocab.json", "deep": {"cache": "/scratch/jane/x"}}
    path.write_text(json.dumps(kept | local))
    assert json.loads(without_local_paths(path)) == kept | {"deep": {}}
