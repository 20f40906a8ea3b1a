"""What the files of a model may hold to be sent: nothing from outside their folder, and no secrets, names or local paths."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from elm_ecg.training.sharing.disclosure import check_secrets, check_text

# their words are those of the language model, among which some look like names of people
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
NO_TEXT = (".safetensors", ".npz", ".parquet")
# keys of JSON that hold what opens an account; those of a tokenizer, such as eos_token, do not
SECRET_KEY = re.compile(
    r"(?:^|_)(?:api_?key|passw(?:or)?d|secret(?:_?(?:access_?)?key)?|private_?key|(?:hub|hf|auth|access|refresh|api)_?token)$",
    re.IGNORECASE,
)


def own_file(folder: Path, path: Path) -> Path:
    """The path of a file in the folder, unless it is a link that leads out of it.

    Links of a snapshot in the Hub's cache lead into the `blobs` beside it, which are the same repository's.

    Raises:
        ValueError: it leads elsewhere.
    """
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise ValueError(
            f"{path} is a link to {target}, outside of the folder: nothing was shared. Put the file itself there, or take the link away."
        )
    return path


def module_file(folder: Path, module: str, source: Path) -> Path:
    """The file of a module of Python that a configuration or another module names.

    Raises:
        ValueError: the name is a path, and may lead out of the folder; `source` says where it stands.
    """
    if not module.isidentifier():
        raise ValueError(
            f"{source} names the code {module!r}; expected a module beside it, such as modeling_elm. Nothing was shared."
        )
    return own_file(folder, folder / f"{module}.py")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys differ."""
    if len(content := dict(pairs)) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _lines(value: Any, key: str = "") -> Iterator[str]:
    """Every key and text of JSON, of all depths, as `key: text`."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _lines(part, name)
    elif isinstance(value, list):
        yield key
        for part in value:
            yield from _lines(part)
    else:
        yield f"{key}: {value}" if key and isinstance(value, str) else value if isinstance(value, str) else key


def _keys(value: Any) -> Iterator[tuple[str, Any]]:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(part)
    if isinstance(value, dict):
        yield from value.items()


def _without_words(content: Any) -> Any:
    """A tokenizer.json without what its model has learnt; nothing of a plain vocabulary."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return None
    return {**content, "model": {key: part for key, part in model.items() if key not in ("vocab", "merges")}}


def _check_json(path: Path, text: str) -> None:
    if path.name in WORDS:
        check_secrets(path, text)  # megabytes, that are looked through as they stand
    try:
        content = json.loads(text, object_pairs_hook=_unique)
        if path.name in WORDS:
            content = _without_words(content)
        keys, lines = list(_keys(content)), "\n".join(_lines(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or damaged: {error}; save it again.") from error
    secrets = [key for key, value in keys if isinstance(value, str) and value and SECRET_KEY.search(key)]
    if secrets:
        raise ValueError(f"{path} has a secret in {secrets[0]!r}: nothing was shared. Take it out, and revoke it.")
    check_text(path, lines)


def check_contents(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Looks through all that is sent of a folder, but its weights and recordings.

    Args:
        files: path in the repository -> content, or where that is; `folder` has files of the same names.

    Raises:
        ValueError: one is from outside of the folder, or a text has a secret, a name, or a path of this machine.
    """
    for name, content in files.items():
        path = own_file(folder, folder / name)
        if path.suffix in NO_TEXT:
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        try:
            # words of SentencePiece stand among other bytes
            text = data.decode("utf-8", "replace" if path.suffix == ".model" else "strict")
        except UnicodeDecodeError as error:  # in UTF-16 nothing would be found
            raise ValueError(f"{path} is no text in UTF-8: nothing was shared. Save it as UTF-8. ({error})") from error
        if path.suffix == ".json":
            _check_json(path, text)
        elif path.name in WORDS or path.suffix == ".model":
            check_secrets(path, text)
        elif path.suffix != ".html":  # a report is a page, and was looked through as one
            check_text(path, text)
