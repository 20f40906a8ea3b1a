import os
from pathlib import Path

import pytest

from elm_ecg.training.files import atomic_path, check_output_folder, new_folder, write_text


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


def test_a_read_only_output_folder(tmp_path):
    if os.access("/sys/kernel", os.F_OK):  # root may write wherever permissions are all that forbids it
        with pytest.raises(ValueError, match="--output_dir /sys/kernel/out cannot be written: "):
            check_output_folder(Path("/sys/kernel/out"))
    tmp_path.chmod(0o555)
    if os.geteuid():
        with pytest.raises(ValueError, match="cannot be written: Permission denied"):
            check_output_folder(tmp_path / "out")
