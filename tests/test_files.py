import errno
import os
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from elm_ecg.training.files import (
    atomic_path,
    check_apart,
    check_output_folder,
    ending_on_sigterm,
    naming,
    new_folder,
    no_room,
    read_json,
    write_text,
)


def test_write_text(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "é\n")
    write_text(path, "new é\n")
    assert path.read_bytes() == "new é\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(FileNotFoundError) as raised:
        write_text(path, "text")
    assert raised.value.filename == str(path)


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "a.png") as temporary:
        assert temporary.suffix == ".png"  # Matplotlib goes by it
        assert temporary.parent == tmp_path


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "a.txt", "text")


@pytest.mark.parametrize("exists", [True, False])
def test_new_folder_through_a_link(tmp_path, exists):
    """What is written is not lost when the work is done."""
    target, link = tmp_path / "disk", tmp_path / "link"
    if exists:
        target.mkdir()
    link.symlink_to(target)
    with new_folder(link) as folder:
        write_text(folder / "a.txt", "text")
    assert link.is_symlink()
    assert [path.name for path in target.iterdir()] == ["a.txt"]


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    for content, message in (("[]", "holds a list; expected a JSON object"), ("{", "is not JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            read_json(path)


@pytest.mark.parametrize("place", [atomic_path, new_folder])
def test_sigterm_leaves_nothing(tmp_path, place):
    """The handler that was there is there afterwards."""
    before = signal.getsignal(signal.SIGTERM)

    def wait() -> None:
        with ending_on_sigterm(), place(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)

    with pytest.raises(SystemExit) as raised:
        wait()
    assert raised.value.code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_others_read_the_weights_of_a_new_folder(tmp_path):
    with new_folder(tmp_path / "model") as folder:
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_sigterm_of_a_worker_does_not_tidy_up_for_its_parent(tmp_path):
    with ending_on_sigterm(), new_folder(tmp_path / "out") as folder:
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM  # not by a handler of Python's
        assert folder.is_dir()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FULL, errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (OSError(errno.EFBIG, "File too large"), errno.EFBIG),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),  # of tokenizers
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), errno.ENOSPC),
        (RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"), None),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
        (ValueError("another"), None),
    ],
)
def test_no_room(error, number, tmp_path):
    """Libraries say it in errors of their own, and as the cause of others."""
    wrapped = RuntimeError("the work failed")
    wrapped.__cause__ = error
    assert no_room(error) == no_room(wrapped) == number
    with pytest.raises(type(error) if number is None else OSError) as raised, naming(tmp_path / "out"):
        raise error
    assert number is None or (raised.value.errno, raised.value.filename) == (number, str(tmp_path / "out"))


def test_a_real_full_device():
    """What PyTorch and Python themselves raise."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left on device: 'weights'"), naming("weights"):
        torch.save({"a": torch.zeros(100_000)}, "/dev/full")
    with (
        pytest.raises(OSError, match="No space left on device: 'text'"),
        naming("text"),
        open("/dev/full", "w") as file,
    ):
        file.write("text" * 10_000)
    with pytest.raises(zipfile.BadZipFile), naming("other"):
        zipfile.ZipFile("/dev/null")


def test_check_output_folder(tmp_path):
    """It leaves nothing, and makes no folder."""
    check_output_folder(tmp_path / "a" / "b", new=True)
    check_output_folder(tmp_path, new=True)
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "a.txt", "text")
    check_output_folder(tmp_path)
    with pytest.raises(ValueError, match="is there and not empty; name another"):
        check_output_folder(tmp_path, new=True)
    for path in (tmp_path / "a.txt", tmp_path / "a.txt" / "b"):
        with pytest.raises(ValueError, match=f"--output_dir {path} cannot be written: Not a directory"):
            check_output_folder(path)


def test_what_is_read_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    (tmp_path / "link").symlink_to("llm")
    check_apart(tmp_path / "out", llm="llm", encoder=None, data=["out", "owner/data"])
    for read in ({"llm": "llm/"}, {"encoder": "link"}, {"data": ["other", str(tmp_path / "llm")]}):
        with pytest.raises(ValueError, match=f"is the folder of --{next(iter(read))}, which would be written over"):
            check_apart(Path("llm"), **read)
    for name in ("data/train", "encoder", "base_model/data", "checkpoint-2"):
        (tmp_path / "out" / name).mkdir(parents=True)
    check_apart(
        Path("out"), data=["out/data", "out/data/train", "out/encoder", "out/checkpoint-9"]
    )  # the last is not there
    for name in ("base_model", "base_model/data", "checkpoint-2"):
        with pytest.raises(
            ValueError, match=f"--data out/{name} lies in {name.split('/')[0]} of --output_dir out, which"
        ):
            check_apart(Path("out"), data=[f"out/{name}"])
    with pytest.raises(ValueError, match="--data out/encoder lies in encoder of --output_dir"):
        check_apart(Path("out"), ["encoder"], data=["out/encoder"])


def test_a_read_only_output_folder(tmp_path):
    if os.access("/sys/kernel", os.F_OK):  # root may write wherever permissions are all that forbids it
        with pytest.raises(ValueError, match="--output_dir /sys/kernel/out cannot be written: "):
            check_output_folder(Path("/sys/kernel/out"))
    tmp_path.chmod(0o555)
    if os.geteuid():
        with pytest.raises(ValueError, match="cannot be written: Permission denied"):
            check_output_folder(tmp_path / "out")


def test_new_folder_removes_what_killed_processes_left(tmp_path):
    """But not what another process still writes, nor what others have put there."""
    for name in (".data-old", ".data-archived", ".other-12345678.unfinished"):
        (tmp_path / name).mkdir()
    if not (child := os.fork()):
        with new_folder(tmp_path / "data") as folder:
            write_text(folder / "a.txt", "text")
            os.kill(os.getpid(), 9)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 4
    others = {".data-old", ".data-archived", ".other-12345678.unfinished"}
    with new_folder(tmp_path / "data") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {*others, folder.name}
        with pytest.raises(RuntimeError), new_folder(tmp_path / "data"):
            raise RuntimeError
        write_text(folder / "a.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "data"}
