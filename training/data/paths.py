"""Which files the rows of a dataset may name: those of one folder. A dataset of a stranger may name any file of this machine."""

import os
from functools import lru_cache
from typing import Any

from elm_ecg.training.data.schema import LITERALS, as_list


def confined(path: str, root: str | None) -> str:
    """The path of an ECG that a row names, if the file is in the folder `root` or below it, links followed.

    Args:
        path: relative to `root`, or absolute.
        root: None where no folder is known, so that no file may be read.

    Raises:
        ValueError: the file is elsewhere.
    """
    if root is None:
        raise ValueError(f"The ECG is the file {path!r}; say under which folder such files are with --ecg_root.")
    whole = os.path.join(root, path)  # an absolute path stays what it is
    target, folder = os.path.realpath(whole), _real(root)
    if os.path.commonpath((folder, target)) != folder:
        leads_to = "" if target == whole else f", which leads to {target}"
        raise ValueError(
            f"The ECG is the file {path!r}{leads_to}, outside of {root}: no other files are read. Name the folder that holds it "
            "with --ecg_root, if you trust the dataset."
        )
    return whole


@lru_cache
def _real(root: str) -> str:
    return os.path.realpath(root)


def confined_row(row: dict[str, Any], index: int, root: str | None) -> dict[str, Any]:
    """The column `ecg` of a row, with its paths as `confined` gives them; ValueError, which names the row, if one is elsewhere."""

    def place(ecg: Any) -> Any:
        if isinstance(ecg, dict) and ecg.get("path") is not None:
            return {**ecg, "path": place(ecg["path"])}
        return confined(ecg, root) if isinstance(ecg, str) and ecg not in LITERALS else ecg

    try:
        ecgs = [place(ecg) for ecg in as_list(row["ecg"])]
    except ValueError as error:
        raise ValueError(f"Row {index}: {error}") from error
    return {"ecg": ecgs if isinstance(row["ecg"], list) else ecgs[0]}
