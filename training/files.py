"""Files and folders that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".unfinished"  # the suffix of temporary folders


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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and goes when it does not.

    What a process that was killed left there of the same `path` goes too.

    Raises:
        ValueError: `path` is there and not empty, or cannot be written.
    """
    path = path.resolve()  # a link stays, and what it leads to is replaced
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output_dir {path} is there and not empty; name another, or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=UNFINISHED))
    except OSError as error:
        raise ValueError(f"--output_dir {path} cannot be written: {error.strerror}. Name another.") from error
    lock = _locked(temporary)
    _remove_abandoned(path)
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp gives 0700
        if path.exists():
            path.rmdir()  # empty; Windows replaces no folder, not even such a one
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is no longer there if all went well
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A file handle that keeps a folder locked until it is closed or the process ends, however that comes about.

    None where that is not possible, or another process has locked the folder.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary folders of `new_folder(path)` whose processes have ended, as they were killed."""
    for folder in list(path.parent.iterdir()):
        if folder.name.startswith(f".{path.name}-") and folder.name.endswith(UNFINISHED):
            with suppress(OSError):  # of somebody else, or just gone
                if (lock := _locked(folder)) is not None:  # nobody holds it
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)
