import os

import pytest

from elm_ecg.training.files import atomic_path, new_folder, write_text


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
