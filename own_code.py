"""Encoders and connectors whose code is neither of this project nor of transformers: how it is named, saved and loaded.

The code of such a part is one module, with those that it imports by `from .name import ...`. It lies beside the weights of a saved
ELM, whose config.json names the class as `module.Class`. It runs if whoever loads the model says `trust_remote_code=True`.
"""

import ast
import hashlib
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

HERE = Path(__file__).parent


def own_reference(own_class: type) -> str:
    """What config.json calls the class: `module.Class`."""
    return f"{own_class.__module__.rpartition('.')[2]}.{own_class.__name__}"


def own_files(own_class: type) -> list[Path]:
    """The module of the class, and those that it imports from beside it.

    Raises:
        ValueError: the class was not made by a file.
    """
    file = getattr(sys.modules.get(own_class.__module__), "__file__", None)
    if own_class.__module__ == "__main__" or file is None:
        raise ValueError(
            f"{own_class.__name__} is defined in {own_class.__module__}, whose code cannot be saved with the model; move it into a "
            "file of its own and import it from there."
        )
    try:
        return sorted({Path(file), *map(Path, get_relative_import_files(file))})
    except FileNotFoundError as error:
        raise ValueError(
            f"{Path(file).name}, the code of {own_class.__name__}, imports {error.filename}, which is not there; what it needs has to "
            "lie beside it, in the same folder."
        ) from error


def check_own_files(own_class: type, taken: dict[str, Path]) -> None:
    """Checks that the code of a class still works once it lies beside the weights.

    Args:
        taken: name -> file of what lies there already, to which the files of this class are added.

    Raises:
        ValueError: it has a name that is taken, or imports what would not be there.
    """
    for file in own_files(own_class):
        if file.name in taken and taken[file.name].read_bytes() != file.read_bytes():
            raise ValueError(
                f"{file}, the code of {own_class.__name__}, has the name of another file that is saved with the model; rename it."
            )
        taken[file.name] = file
        _check_imports(file)


def _check_imports(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and (node.level > 1 or "." in (node.module or ".")):
            raise ValueError(
                f"{file}, line {node.lineno}: only `from .name import ...` of a file in the same folder is saved with the model."
            )
    for node in tree.body:  # what is imported within `try` and functions may be missing
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        for top in {name.partition(".")[0] for name in names}:
            origin = getattr(find_spec(top), "origin", None)
            beside = [file.parent / f"{top}.py", file.parent / top / "__init__.py"]
            if origin is not None and Path(origin) in beside and file.parent.name != "site-packages":
                raise ValueError(
                    f"{file}, line {node.lineno}: {top} lies beside it, but is not saved with the model; put all into one file, or "
                    f"write `from .{top} import ...`."
                )


def save_own_files(own_class: type, folder: str | Path) -> None:
    """Copies the code of the class into the folder of a saved model."""
    for file in own_files(own_class):
        target = Path(folder) / file.name
        if not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)


def digest_of_code(own_class: type) -> str:
    """A digest of the code of a class: with it changes what its weights give."""
    digest = hashlib.sha256()
    for file in own_files(own_class):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def load_own_class(reference: str, place: str | os.PathLike, trust_remote_code: bool | None, **hub_kwargs: Any) -> type:
    """The class that config.json calls `module.Class`, from the code beside it.

    Args:
        place: Hub id or local folder.
        trust_remote_code: run that code.
        hub_kwargs: `revision`, `cache_dir`, `token` and others of `from_pretrained`.

    Raises:
        ValueError: the code is not to be run, or lies elsewhere, or has no such class.
    """
    # this very file came from a model's folder, so the code there may run
    if not (trust_remote_code or __name__.startswith("transformers_modules.")):
        raise ValueError(
            f"{place} has code of its own, {reference}, which is not run unasked. Read it, and if you trust it, load the model with "
            "trust_remote_code (--trust_remote_code on the command line)."
        )
    module, _, name = reference.rpartition(".")
    if not (module.isidentifier() and name.isidentifier()):
        raise ValueError(
            f"{place} names its code {reference!r}; expected module.Class, of a file module.py there whose name has letters, digits and _ alone."
        )
    try:
        return get_class_from_dynamic_module(reference, str(place), **hub_kwargs)
    except (OSError, AttributeError) as error:
        raise ValueError(f"{place} has no file {module}.py with a class {name}.") from error
