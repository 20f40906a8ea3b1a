"""Files and folders that are either whole or not there."""

import errno
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".unfinished"  # the suffix of temporary folders
REPLACED = ("checkpoint-*", "base_model", UNFINISHED)  # what in its --output_dir a training run replaces or removes


def resource(name: str) -> Path:
    """A file or folder that comes with the package: `model_cards/model.md`, `training/configs`."""
    return Path(str(files("elm_ecg") / name))


# what a disk says that has no room, a quota that is used up, and a file that exceeds what its process may write
NO_ROOM = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


def no_room(error: BaseException | None) -> int | None:
    """Which of `NO_ROOM` an error says, its causes included: safetensors, tokenizers and PyArrow raise errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error.errno
        for number, text in NO_ROOM.items():
            if text in str(error):
                return number
        if "PytorchStreamWriter failed" in str(error) or "unexpected pos" in str(error):
            return errno.ENOSPC  # PyTorch does not say why it could not write
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the block that a disk is full names `path`, whatever library raises it and of which temporary file."""
    try:
        yield
    except Exception as error:
        number = no_room(error)
        if number is None:
            raise
        raise OSError(number, NO_ROOM[number], str(path)) from error


def _end(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _end_at_once_if_forked() -> None:
    """A forked worker has no part in what its parent has to tidy up, and must end when a pool says so: Python calls handlers of
    its own only between two steps, and a worker that waits for its next task takes none."""
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_end_at_once_if_forked)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM, as of Slurm and of `docker stop`, ends the block as an exception: temporary files and folders go."""
    try:
        before = signal.signal(signal.SIGTERM, _end)
    except ValueError:  # only the main thread may set it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        with naming(path):
            yield temporary
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, which a web server or a colleague cannot read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file does not hold one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def let_others_read_weights(folder: Path) -> None:
    """Gives the weights in a folder the mode of its other files; `safetensors` writes them for their owner alone (0600)."""
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


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
        # asks the disk itself: permissions do not tell that it is read-only
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(f"--output_dir {path} cannot be written: {error.strerror}. Name another.") from error


def check_apart(output_dir: Path, replaced: Iterable[str] = REPLACED, **read: str | Iterable[str] | None) -> None:
    """ValueError if `output_dir` is a folder that an option names to be read, and that the model would be written over.

    Args:
        replaced: patterns of what in `output_dir` a run replaces or removes; nothing is read from there either.
        read: option -> the place or places that it names.
    """
    output = output_dir.resolve()
    for option, places in read.items():
        for place in [places] if isinstance(places, str) else places or ():
            path = Path(place).resolve()
            if Path(place).is_dir() and path == output:
                raise ValueError(
                    f"--output_dir {output_dir} is the folder of --{option}, which would be written over; name another."
                )
            inside = path.relative_to(output).parts[:1] if path.exists() and path.is_relative_to(output) else ()
            if any(fnmatchcase(name, pattern) for name in inside for pattern in replaced):
                raise ValueError(
                    f"--{option} {place} lies in {inside[0]} of --output_dir {output_dir}, which the run replaces or removes; name another "
                    "--output_dir."
                )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and goes when it does not.

    What a process that was killed left there of the same `path` goes too.

    Raises:
        ValueError: `path` is there and not empty, or cannot be written.
    """
    check_output_folder(path, new=True)
    path = path.resolve()  # a link stays, and what it leads to is replaced
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=UNFINISHED))
    except OSError as error:
        raise ValueError(f"--output_dir {path} cannot be written: {error.strerror}. Name another.") from error
    lock = _locked(temporary)
    _remove_abandoned(path)
    try:
        with naming(path):
            yield temporary
        temporary.chmod(0o755)  # mkdtemp gives 0700
        let_others_read_weights(temporary)
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
