"""Parts of datasets: row groups of long recordings and of comparisons, and the processes that read."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from elm_ecg.training.data import parts as data_parts
from elm_ecg.training.data.loading import ecgs_of, load_dataset
from elm_ecg.training.data.parts import Found, Part, in_processes
from elm_ecg.training.dataset_commands import main

ASKED = {"question": "Is it?", "answer": "yes", "split": "train"}
PARTS = [Part("train", number, 2, {"a": 1}, [], {}, (), False) for number in range(2)]


def takes_long(part: Part) -> None:
    time.sleep(60)


def ignores_interrupts(part: Part) -> Found:
    return Found(rows=int(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))


def test_row_groups_without_rows(tmp_path, monkeypatch):
    """Of records whose questions come later, as they compare."""
    monkeypatch.setattr(data_parts, "ROW_GROUP_RECORDS", 1)
    array = np.random.default_rng(0).integers(-2000, 2000, (12, 1000), dtype=np.int16)
    np.savez(tmp_path / "all.npz", **dict.fromkeys("abcd", array))
    asked = [{**ASKED, "record": [*"abcd"]}]
    (tmp_path / "q.json").write_text(json.dumps(asked))
    options = ["--questions", f"{tmp_path}/q.json", "--sampling_rate", "100", "--unit", "uV"]
    main(["build", f"{tmp_path}/all.npz", *options, "--output_dir", f"{tmp_path}/out"])
    assert len(ecgs_of(load_dataset(f"{tmp_path}/out", "train")[0])) == 4


def test_ctrl_c_does_not_wait_for_parts():
    """Which may take minutes; what they have written by then is not whole, and goes."""

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(in_processes(takes_long, PARTS, 2, interrupted))
    assert time.monotonic() - begun < 20


def test_long_recordings_in_windows(tmp_path, monkeypatch):
    """Days of them, in row groups that a reader can hold; windows of fractions of a second have names of their own."""
    monkeypatch.setattr(data_parts, "ROW_GROUP_RECORDS", 3)
    rate, start = 10, 100_000
    array = np.full((1, (start + 3) * rate), np.nan, np.float32)
    array[:, start * rate :] = np.arange(3 * rate) / 1000
    array[:, : 2 * rate] = 0.5
    np.savez(tmp_path / "long.npz", ecg=array, sampling_rate=rate, unit="mV", lead_names=np.array(["II"]))
    (tmp_path / "q.json").write_text(json.dumps([{**ASKED, "record": "long"}]))
    paths = [f"{tmp_path}/{name}" for name in ("long.npz", "q.json", "out")]
    main(["build", paths[0], "--questions", paths[1], "--output_dir", paths[2], "--window", "0.5"])
    data = load_dataset(paths[2], "train")
    assert data["start_second"][:] == [0, 0.5, 1, 1.5, *(start + 0.5 * number for number in range(6))]
    for number, row in enumerate(data.select(range(4, 10))):
        expected = np.arange(5) + 5 * number
        np.testing.assert_array_equal(ecgs_of(row)[0]["array"], [expected])
    (file,) = Path(paths[2], "records").iterdir()
    content = pq.ParquetFile(file).metadata
    assert [content.row_group(index).num_rows for index in range(content.num_row_groups)] == [3, 3, 3, 1]


def test_ctrl_c_is_left_to_the_main_process():
    watched = []
    assert [found.rows for _, found in in_processes(ignores_interrupts, PARTS, 2, watched.append)] == [1, 1]
