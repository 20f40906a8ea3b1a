"""Files and folders that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path


def resource(name: str) -> Path:
    """A file or folder that comes with the package: `model_cards/model.md`, `training/configs`."""
    return Path(str(files("elm_ecg") / name))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and goes when it does not."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # of what was asked for
    os.close(handle)
    temporary = Path(name)  # it has the suffix of `path`, by which savefig chooses the format
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, which a web server or a colleague cannot read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_output_folder(path: Path, new: bool = False) -> None:
    """Refuses an `--output_dir` before work that takes long; leaves nothing behind.

    Args:
        new: it has to be empty, or not there.

    Raises:
        ValueError: it is a file, cannot be written, or is not empty though `new`.
    """
    try:
        path = path.resolve()
        if new and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"--output_dir {path} is there and not empty; name another, or remove it.")
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
        tempfile.TemporaryFile(
            dir=nearest
        ).close()  # asks the disk itself: permissions do not tell that it is read-only
    except OSError as error:
        raise ValueError(f"--output_dir {path} cannot be written: {error.strerror}. Name another.") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and goes when it does not.

    Raises:
        ValueError: `path` is there and not empty, or cannot be written.
    """
    check_output_folder(path, new=True)
    path = path.resolve()  # a link stays, and what it leads to is replaced
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    except OSError as error:
        raise ValueError(f"--output_dir {path} cannot be written: {error.strerror}. Name another.") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp gives 0700
        if path.exists():
            path.rmdir()  # empty; Windows replaces no folder, not even such a one
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is no longer there if all went well
