import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from PIL import Image

from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.tokenization_ecg_byte import ECGByteTokenizer
from elm_ecg.training import cli
from elm_ecg.training.tokenizer import _runs, main, measure, read_records

LEADS = ["I", "II"]


def walk(seed: int, num_samples: int = 400) -> np.ndarray:
    """Microvolts [2, samples]."""
    return np.random.default_rng(seed).normal(0, 40, (2, num_samples)).cumsum(axis=1).astype(np.int16)


def as_ecg(array: np.ndarray, sampling_rate: int = 500) -> dict[str, Any]:
    unit = "mV" if array.dtype.kind == "f" else "uV"
    return {"array": array.tolist(), "sampling_rate": sampling_rate, "lead_names": LEADS, "unit": unit}


def save(folder: Path, ecgs: list[Any], split: str = "train", **info: str) -> str:
    data = Dataset.from_list([{"ecg": ecg} for ecg in ecgs])
    for key, value in info.items():
        setattr(data.info, key, value)
    DatasetDict({split: data}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Three records, one of them longer and one of them twice, and a row without ECG."""
    ecgs = [as_ecg(walk(0)), as_ecg(walk(1, 700)), None, as_ecg(walk(0)), as_ecg(walk(2))]
    folder = tmp_path_factory.mktemp("data") / "walks"
    return save(folder, ecgs, license="CC BY 4.0", citation="Nobody 2000, On walks")


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """What the feature extractor makes of the three records."""
    extractor = ECGFeatureExtractor(sampling_rate=250, num_samples=1000, lead_names=LEADS)
    ecgs = [as_ecg(walk(0)), as_ecg(walk(1, 700)), as_ecg(walk(2))]
    return [np.array(ecg) for ecg in extractor(ecgs, padding=False)["ecg_values"]]


def train(data: str, folder: Path, *options: str) -> ECGByteTokenizer:
    argv = ["train", "--data", data, "--output_dir", str(folder), "--lead_names", *LEADS, "--num_merges", "30"]
    main([*argv, *options])
    return ECGByteTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "walker"
    train(data, folder, "--millivolt_range", "-1", "1")
    return folder


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--millivolt_range", "-1.5", "2"], {"millivolt_range": (-1.5, 2.0)}),
        (["--within_leads"], {"across_leads": False}),
        (["--min_frequency", "40"], {"min_frequency": 40}),
    ],
)
def test_train_is_that_of_what_the_extractor_makes_of_each_distinct_record(options, settings, data, expected, tmp_path):
    tokenizer = train(data, tmp_path, *options)
    flat = [] if "millivolt_range" in settings else [np.zeros_like(expected[0])]
    same = ECGByteTokenizer.train([*expected, *flat], num_merges=30, sampling_rate=250, show_progress=False, **settings)
    assert tokenizer.merges == same.merges
    assert ("one flat record" in (tmp_path / "README.md").read_text()) is bool(flat)
    assert (len(tokenizer.merges) == 30) is ("min_frequency" not in settings)
    assert tokenizer.millivolt_range == settings.get("millivolt_range")
    assert tokenizer.across_leads is settings.get("across_leads", True)
    assert tokenizer.sampling_rate == 250


def test_a_flat_record_is_a_few_tokens(data, expected, tmp_path):
    tokenizer = train(data, tmp_path)
    plain = ECGByteTokenizer.train(expected, num_merges=30, show_progress=False)
    flat = np.zeros((2, 200), np.float32)
    assert 10 * len(tokenizer.encode(flat)) < len(plain.encode(flat))


def test_what_training_says(data, tmp_path, capsys):
    train(data, tmp_path / "tokenizer", "--num_merges", "100000", "--min_frequency", "50")
    captured = capsys.readouterr()
    # 200, 350 and 200 samples of each of two leads
    assert "3 records of 2 leads at 250 Hz, 1,500 samples in all" in captured.out
    assert "No other pair occurs 50 times" in captured.out
    assert "samples for each token" in captured.out
    assert str(tmp_path / "tokenizer") in captured.out
    assert "Reading: 100%" in captured.err
    assert "Merging" in captured.err


def test_notices_are_told_with_the_number_of_their_records(tmp_path, capsys):
    ecgs = [as_ecg(walk(seed)) for seed in range(3)]
    for ecg in ecgs[:2]:
        ecg.update(array=[*ecg["array"], ecg["array"][0]], lead_names=[*LEADS, "resp"])
    train(save(tmp_path / "data", ecgs), tmp_path / "tokenizer")
    assert "Left out, as no standard lead has that name: resp. (2 of 3 records)\n" in capsys.readouterr().out
    np.savez(tmp_path / "one.npz", **ecgs[0])
    main(
        [
            "inspect",
            str(tmp_path / "tokenizer"),
            "--ecg",
            str(tmp_path / "one.npz"),
            "--output",
            str(tmp_path / "a.png"),
        ]
    )
    assert "  Left out, as no standard lead has that name: resp.\n" in capsys.readouterr().out


def test_card(trained):
    card = ModelCard.load(trained / "README.md")
    assert "ecg-byte" in card.data.tags
    assert "# walker\n" in card.text
    assert "30 merges" in card.text
    assert "divide -1 to 1 mV" in card.text
    assert "run on from one lead into the next" in card.text
    assert "| ECG input | I, II at 250 Hz, in millivolts |" in card.text
    assert "`walks` (train): 3 records of 2 leads at 250 Hz, 1,500 samples in all" in card.text
    assert "CC BY 4.0" in card.text
    assert "Nobody 2000, On walks" in card.text
    assert "not a medical device" in card.text
    assert str(trained.parent) not in card.text
    compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_folder_holds_the_tokenizer_and_its_card(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["README.md", "ecg_byte.json"]
    assert json.loads((trained / "ecg_byte.json").read_text())["sampling_rate"] == 250


def test_no_rights_are_known(tmp_path):
    train(save(tmp_path / "data", [as_ecg(walk(0))]), tmp_path / "tokenizer", "--within_leads")
    card = (tmp_path / "tokenizer" / "README.md").read_text()
    assert "The datasets name neither." in card
    assert "never run from one lead into the next" in card
    assert "divide the range of each record" in card


def test_several_splits_and_a_share_of_the_rows(tmp_path, capsys):
    rows = {split: Dataset.from_list([{"ecg": as_ecg(walk(seed))} for seed in range(4)]) for split in ("train", "val")}
    DatasetDict(rows).save_to_disk(tmp_path / "data")
    train(str(tmp_path / "data"), tmp_path / "a", "--split", "train", "val")
    assert "4 records" in capsys.readouterr().out  # the same in both
    train(str(tmp_path / "data"), tmp_path / "b", "--data_subset", "0.5")
    assert "2 records" in capsys.readouterr().out


def test_records_of_files_lists_and_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", array=walk(0), sampling_rate=500, lead_names=LEADS, unit="uV")
    path = str(tmp_path / "a.npz")
    array = {**as_ecg(walk(0)), "array": walk(0)}
    rows = [{"ecg": path}, {"ecg": [path, array]}, {"ecg": None}, {"ecg": [{**array, "array": walk(1)}]}, {"ecg": path}]
    records = list(read_records(rows, ["II", "III"], 500))
    assert [record.lead_names for record in records] == [("II", "III")] * 2
    assert np.allclose(records[1].array[1], (walk(1)[1] - walk(1)[0]) / 1000, atol=1e-6)


def test_the_same_samples_at_another_rate_or_of_other_leads_are_another_record():
    array = {"array": walk(0), "unit": "uV"}
    rows = [
        {"ecg": {**array, "sampling_rate": rate, "lead_names": leads}}
        for rate, leads in ((500, LEADS), (250, LEADS), (250, LEADS), (250, ["V1", "V2"]))
    ]
    assert len(list(read_records(rows, None, None))) == 3


def test_a_file_is_read_once(tmp_path):
    np.savez(tmp_path / "a.npz", array=walk(0), sampling_rate=500, lead_names=LEADS, unit="uV")

    def rows():
        yield {"ecg": str(tmp_path / "a.npz")}
        (tmp_path / "a.npz").unlink()
        yield {"ecg": str(tmp_path / "a.npz")}

    assert len(list(read_records(rows(), None, None))) == 1


def test_leads_stand_in_standard_order_unless_named():
    ecg = {"array": walk(0), "sampling_rate": 500, "lead_names": ["V1", "II"], "unit": "uV"}
    (record,) = read_records([{"ecg": ecg}], None, None)
    assert record.lead_names == ("II", "V1")
    assert np.array_equal(record.array, walk(0)[::-1].astype(np.float32) / np.float32(1000))


BROKEN = np.array([[0.5, np.nan, np.nan, np.nan] * 20] * 2)


@pytest.mark.parametrize(
    ("ecgs", "options", "message"),
    [
        ([as_ecg(walk(0))], ["--millivolt_range", "1", "-1"], "millivolt_range is (1.0, -1.0); expected two finite"),
        ([as_ecg(walk(0))], ["--sampling_rate", "0"], "sampling_rate is 0.0; expected a positive number"),
        ([as_ecg(walk(0))], ["--lead_names", "I", "V9"], "Unknown lead 'V9'"),
        ([as_ecg(walk(0))], ["--lead_names", "I", "V1"], "Row 0, counted from 0: The ECG has no lead V1"),
        ([as_ecg(walk(0))], ["--data_subset", "2"], "--data_subset is 2.0"),
        ([as_ecg(walk(0))], ["--split", "train", "val"], "has no split 'val'"),
        ([as_ecg(walk(0)), as_ecg(BROKEN, 50)], [], "Row 1, counted from 0: Lead I has a gap"),
        ([None], [], "There is no record to train on."),
        ([as_ecg(walk(0))], ["--data", "nowhere"], "No dataset 'nowhere'"),
    ],
)
def test_faulty_training_input(ecgs, options, message, tmp_path, capsys):
    features = None if ecgs != [None] else Dataset.from_list([{"ecg": as_ecg(walk(0))}]).features
    Dataset.from_list([{"ecg": ecg} for ecg in ecgs], features=features).save_to_disk(tmp_path / "data")
    argv = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--lead_names", *LEADS, *options]
    assert cli.main(["tokenizer", "train", *argv]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_data_without_the_column(tmp_path, capsys):
    Dataset.from_list([{"text": "words"}]).save_to_disk(tmp_path / "data")
    argv = ["tokenizer", "train", "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(argv) == 1
    assert "has the columns ['text']; expected 'ecg'" in capsys.readouterr().err


def test_output_folder_is_a_file(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("elm_ecg.training.tokenizer.load_ecgs", None)  # found out before the data are read
    assert cli.main(["tokenizer", "train", "--data", data, "--output_dir", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["train", "--data", "x"],
        ["train", "--data", "x", "--output_dir", "y", "--num_merges", "0"],
        ["train", "--data", "x", "--output_dir", "y", "--min_frequency", "many"],
        ["train", "--data", "x", "--output_dir", "y", "--millivolt_range", "1"],
        ["inspect"],
        ["import", "x.pkl"],
    ],
)
def test_faulty_options(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert re.match(r"elm tokenizer.*: .*\n.*(--help|usage)", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["train", "inspect", "import"])
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: elm tokenizer {command}" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["prepare", "ECGByteTokenizer.train", "make_card"])  # reading, merging, writing
def test_ctrl_c_leaves_nothing_half_written(place, data, tmp_path, capsys, monkeypatch):
    def press(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"elm_ecg.training.tokenizer.{place}", press)
    argv = ["--data", data, "--output_dir", str(tmp_path / "out"), "--lead_names", *LEADS, "--num_merges", "5"]
    assert cli.main(["tokenizer", "train", *argv]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "elm tokenizer: interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "import"])
def test_another_tokenizer_is_not_replaced(command, data, tmp_path, capsys, monkeypatch, shared):
    (tmp_path / "ecg_byte.json").write_text("old")
    monkeypatch.setattr("elm_ecg.training.tokenizer.load_ecgs", None)  # found out before the data are read
    of_command = {"train": ["--data", data], "import": [str(shared / "golden" / "seed_ecg_byte_10000.pkl")]}
    assert cli.main(["tokenizer", command, *of_command[command], "--output_dir", str(tmp_path)]) == 1
    assert f"--output_dir {tmp_path} is there and not empty; name another" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.fixture
def letters() -> ECGByteTokenizer:
    """0 mV is a, 1 mV is z; "aa" and "zza" are tokens."""
    return ECGByteTokenizer(["aa", "zza", "aaaa"], millivolt_range=(0.0, 1.0), sampling_rate=100)


def test_measure(letters):
    first = np.array([[0, 0, 0], [1, 1, 0]], dtype=np.float32)  # aa a zza
    second = np.array([[0.5, 0]], dtype=np.float32)  # n a; n is 13 / 25 mV
    usage = measure(letters, [first, second])
    assert usage.num_symbols.tolist() == [6, 2]
    assert usage.num_tokens.tolist() == [3, 2]
    assert {token_id: int(usage.counts[token_id]) for token_id in np.flatnonzero(usage.counts)} == {
        97: 2,
        ord("n"): 1,
        256: 1,
        257: 1,
    }
    assert usage.worst == pytest.approx(0.02, abs=1e-6)
    assert usage.mean_square == pytest.approx(0.02**2 / 8, abs=1e-9)


def test_inspect_settings_alone(letters, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    letters.save_pretrained("letters")
    main(["inspect", "letters"])
    output = capsys.readouterr().out
    assert "26 amplitudes and 3 merges" in output
    assert "divide 0 to 1 mV" in output
    assert "100 Hz" in output
    # 26 single symbols and 2, 3, 4
    assert "mean 1.2, median 1, longest 4 symbols (12, 10, 40 ms)" in output
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]  # no picture of nothing


def test_inspect_a_record(letters, tmp_path, capsys):
    letters.save_pretrained(tmp_path / "letters")
    ecg = np.array([[0, 0, 0, 0], [1, 1, 0, 0.5]], dtype=np.float32)  # aaaa zza n
    np.save(tmp_path / "ecg.npy", ecg)
    options = ["--sampling_rate", "100", "--unit", "mV", "--lead_names", "V1", "V2"]
    output = tmp_path / "tokens.png"
    main(["inspect", str(tmp_path / "letters"), "--ecg", str(tmp_path / "ecg.npy"), *options, "--output", str(output)])
    said = capsys.readouterr().out
    assert "1 record\n" in said
    assert "2.7 symbols a token (2.7 to 2.7)" in said
    assert "3 a record (3 to 3)" in said
    assert "3 of 29 tokens (10.3%)" in said
    assert "mean 2.7, median 3, longest 4 symbols (27, 30, 40 ms)" in said
    assert "0.0071 mV RMS, at most 0.0200 mV" in said  # sqrt(0.02 ** 2 / 8)
    assert "258         1  33.3%  4a\n" in said
    assert "257         1  33.3%  2z a\n" in said
    with Image.open(output) as image:
        assert image.format == "PNG"


def test_inspect_data(trained, data, expected, tmp_path, capsys):
    output = tmp_path / "tokens.svg"
    options = ["--data", data, "--split", "train", "--output", str(output)]
    main(["inspect", str(trained), *options])
    said = capsys.readouterr().out
    tokenizer = ECGByteTokenizer.from_pretrained(trained)
    ratios = np.array([ecg.size / len(tokenizer.encode(ecg)) for ecg in expected])
    assert "3 records\n" in said
    assert f"{ratios.mean():.1f} symbols a token ({ratios.min():.1f} to {ratios.max():.1f})" in said
    assert "<svg" in output.read_text()
    main(["inspect", str(trained), *options, "--max_records", "2"])
    assert "2 records\n" in capsys.readouterr().out


def test_inspect_a_record_beside_data(trained, data, tmp_path, capsys):
    np.savez(tmp_path / "ecg.npz", array=walk(9), sampling_rate=500, lead_names=LEADS, unit="uV")
    output = ["--output", str(tmp_path / "tokens.png")]
    main(["inspect", str(trained), "--ecg", str(tmp_path / "ecg.npz"), "--data", data, "--split", "train", *output])
    assert "4 records\n" in capsys.readouterr().out


def test_unknown_rate_leaves_records_at_their_own(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("elm_ecg.training.tokenizer.plot_tokens", lambda *args: drawn.append(args))
    ECGByteTokenizer(["aa"]).save_pretrained(tmp_path)
    np.savez(tmp_path / "ecg.npz", array=walk(9), sampling_rate=500, lead_names=LEADS, unit="uV")
    main(["inspect", str(tmp_path), "--ecg", str(tmp_path / "ecg.npz")])
    said = capsys.readouterr().out
    assert "unknown, so records are taken at their own" in said
    assert "ms)" not in said
    array, decoded, offsets, sampling_rate, lead_names, *_ = drawn[0]
    assert array.shape == decoded.shape == (2, 400)
    assert offsets[-1, 2] == 399
    assert sampling_rate == 500
    assert lead_names == ("I", "II")


def test_forms_of_a_tokenizer(trained, tmp_path, capsys):
    model = tmp_path / "model"  # a saved model holds more beside it
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "ecg_byte.json").write_bytes((trained / "ecg_byte.json").read_bytes())
    for form in (trained, trained / "ecg_byte.json", model):
        main(["inspect", str(form)])
        assert "30 merges" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "tokens.txt"], "expected a file that ends with .png or .svg"),
        (["--unit", "mV"], "--unit and --lead_names describe the file of --ecg; name one"),
        (["--ecg", "nowhere.npy"], "nowhere.npy"),
        (["--ecg", "ecg.npy"], "The ECG has no sampling rate"),
        (["--data", "nowhere"], "No dataset 'nowhere'"),
        (["--data", "empty", "--split", "train"], "--data empty (train) has no ECG."),
        (["--data", "empty"], "--data empty has no split 'test'."),
    ],
)
def test_faulty_inspection(options, message, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("ecg.npy", walk(0).astype(np.float32) / 1000)
    save(Path("empty"), [None])
    assert cli.main(["tokenizer", "inspect", str(trained), *options]) == 1
    assert message in capsys.readouterr().err
    assert not Path("tokens.png").exists()


def test_no_tokenizer(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "ecg_byte.json").write_text('{"format": "ecg_byte"')
    assert cli.main(["tokenizer", "inspect", str(tmp_path)]) == 1
    assert "is no ECG-Byte tokenizer: not valid JSON" in capsys.readouterr().err
    assert cli.main(["tokenizer", "inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_runs():
    assert _runs("mmmmn") == "4m n"
    assert _runs("ab" * 20) == " ".join("ab" * 6) + " ..."


def test_import_is_the_golden_tokenizer(shared, tmp_path):
    golden = shared / "golden"
    main(["import", str(golden / "seed_ecg_byte_10000.pkl"), "--output_dir", str(tmp_path), "--sampling_rate", "250"])
    saved = json.loads((tmp_path / "ecg_byte.json").read_text())
    assert saved["merges"] == json.loads((golden / "seed_ecg_byte_10000.json").read_text())["merges"]
    assert (saved["normalization"], saved["across_leads"], saved["sampling_rate"]) == ("minmax", True, 250)
    tokenizer = ECGByteTokenizer.from_pretrained(tmp_path)
    ecgs = np.load(golden / "ecg_byte_signals.npz")["ecg"]
    token_ids = json.loads((golden / "ecg_byte_expected.json").read_text())["token_ids"]
    assert [tokenizer.encode(ecg).tolist() for ecg in ecgs] == token_ids
    card = (tmp_path / "README.md").read_text()
    assert "imported from `seed_ecg_byte_10000.pkl`" in card
    assert "10,000 merges of up to 1,024" in card
    assert str(golden) not in card


def test_import_of_no_tokenizer(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(b"no pickle")
    out = tmp_path / "out"
    assert cli.main(["tokenizer", "import", str(tmp_path / "a.pkl"), "--output_dir", str(out)]) == 1
    assert "a.pkl is no ECG-Byte tokenizer of the reference" in capsys.readouterr().err
    assert cli.main(["tokenizer", "import", str(tmp_path / "b.pkl"), "--output_dir", str(out)]) == 1
    assert "b.pkl" in capsys.readouterr().err
    assert not out.exists()


def test_record_of_real_leads_keeps_its_length():
    array = np.zeros((12, 13501), dtype=np.float32)  # 27 s, longer than any model takes
    array[0, 5] = 1
    record = ECGRecord(array, 500, STANDARD_LEADS)
    (prepared,) = read_records([{"ecg": record}], STANDARD_LEADS, 250)
    assert prepared.array.shape == (12, 6751)
