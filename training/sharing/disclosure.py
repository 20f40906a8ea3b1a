"""What is not shared with a model or dataset: pickles, recordings, names, dates, local paths and tokens."""

import html
import json
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elm_ecg.ecg_formats import format_of
from elm_ecg.training.evaluation.results import PROBES, REPORT_FILE
from elm_ecg.training.files import read_json
from elm_ecg.training.markdown import on_hub

# what a run leaves in its folder and nobody needs: states of training, logs, and answers, which quote the data
NOT_SHARED = ["training_args.bin", "trainer_state.json", "*_results.json", "predictions*.jsonl", REPORT_FILE, "*.log"]
NOT_SHARED += ["emissions.csv", "events.out.tfevents.*"]
FOLDERS_NOT_SHARED = [
    "checkpoint-*",
    PROBES,
    "answers",
    "completions",
    "runs",
    "logs",
    "wandb",
    "base_model",
    "__pycache__",
    ".*",
]
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
TABLES = {".csv", ".tsv", ".parquet", ".arrow", ".jsonl", ".xlsx", ".hea", ".dat"}
PAGES = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<(?:!doctype (?:html|svg)|html|svg)\b", re.I | re.S)

# keys of JSON and columns that stand for somebody; datasets have pseudonyms in the first two
PSEUDONYMS = {"patient_id", "record_id"}
PERSONAL = {"patient_name", "birth_date", "date_of_birth", "birthdate", "dob", "mrn", "recorded_at"} | PSEUDONYMS
_LETTER, _CAPITAL = r"[^\W\d_]", r"[^\W\d_a-z]"  # of any alphabet; the second also has small letters beyond a to z
# what stands in place of a name that was taken out
_NOBODY = (
    r"(?!(?:is |was |are |were )?(?:removed|unknown|none|redacted|withheld|hidden|anonym|de-?identif|not |n/a|x{2,}))"
)
NAMES = re.compile(
    # DICOM's and HL7's NAME^NAME
    rf"\b{_LETTER}{{2,}}\^{_LETTER}{{2,}}"
    # fields of a form
    r"|\b(?i:(?:patient|first|last|family|given|sur)(?:'s)?[ _-]?name|patientenname|vorname|nachname)\b[\"']?\s*(?:[:=]|\bis\b)\s*[\"']?"
    rf"(?i:{_NOBODY}){_LETTER}[^\n<\"']{{0,40}}"
    rf"|\b[Pp]atient(?:in)?\s*:\s*(?:[Mm]r|[Mm]rs|[Mm]s)?\.?\s*{_CAPITAL}{_LETTER}+,? {_CAPITAL}{_LETTER}+"
    r"|\b(?i:(?:date of birth|birth ?date|dob|geburtsdatum|mrn|medical record (?:number|no))\b|geb\.)[\"']?\W{0,3}\w{0,4}\d[^\n<\"']{0,40}"
)
_DAY, _MONTH, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
_NAMES_OF_MONTHS = (
    "jan(?:uar)?y? feb(?:ruar)?y? mar(?:ch)? märz apr(?:il)? may mai june? juni? july? juli aug(?:ust)? sept?(?:ember)? o[ck]t(?:ober)? "
    "nov(?:ember)? de[cz](?:ember)?"
)
_NAMED = f"(?i:{'|'.join(_NAMES_OF_MONTHS.split())})"
_WRITTEN = rf"(?=[A-Z]){_NAMED}"  # may is a verb too
DATES = re.compile(
    rf"(?<![\d.]){_YEAR}([-/._]){_MONTH}\1{_DAY}(?!\d)"  # 2002-11-22
    rf"|(?<![\d.]){_DAY}([-/.]){_DAY}\2{_YEAR}(?!\.?\d)"  # 22.11.2002, 11/22/2002
    r"|(?<![\d/]){day}/{day}/\d\d(?![\d/])".replace("{day}", _DAY)  # 22/11/02
    + rf"|(?<![\w.]){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:(?=T\d)|(?!\w|\.\d))"  # 20021122
    rf"|(?<!\d){_DAY}([-/.]){_NAMED}\3{_YEAR}(?!\d)"  # 22-nov-2002
    rf"|(?<!\d){_DAY}(?:st|nd|rd|th|\.)?(?: of)? {_WRITTEN}\.?,? {_YEAR}(?!\d)"  # 22nd of November 2002
    rf"|\b{_WRITTEN}\.? (?:{_DAY}(?:st|nd|rd|th)?,? )?{_YEAR}(?!\d)"  # November 22, 2002, November 2002
)
# each alternative begins with a character: vocabularies of megabytes are searched for it
LOCAL_PATH = re.compile(
    r"/(?<![\w./]/)(?:home|Users|root|mnt|media|scratch|Volumes|tmp)/[^\s'\"`)<>]+|:(?<=\b[A-Za-z]:)\\{1,2}Users\\[^\s'\"`)<>]+"
)
# tokens of Hugging Face, GitHub, OpenAI, GitLab and Slack by what they begin with; those of Amazon and Google, JSON Web Tokens, keys,
# passwords in addresses. Each begins with a character here too
_ALPHANUMERIC, _LONGER = (
    ("hf_", "api_org_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    ("github_pat_", "sk-", "glpat-", "xoxb-", "xoxp-"),
)
TOKEN = re.compile(
    "|".join(
        [rf"{start}(?<![\w-]{start})[A-Za-z0-9]{{20,}}" for start in _ALPHANUMERIC]
        + [rf"{start}(?<![\w-]{start})[\w-]{{20,}}" for start in _LONGER]
        + [r"A[KS]IA[0-9A-Z]{16}(?!\w)", r"AIza[\w-]{35}", r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"]
        + [r"-----BEGIN [A-Z ]*PRIVATE KEY-----", r"://[^\s/:@]+:[^\s/@]{3,}@\w"]
    )
)
# in code and configurations
PASSWORD = re.compile(
    r"(?i:\b(?:api_?key|password|secret_?key|(?:hub|hf|auth|access)_token)\b[\"']?\s*[:=]\s*[\"'][^\"'\s]{8,}[\"'])"
)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's name is one of the patterns of a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_folder(folder: Path, shared: Collection[str]) -> list[str]:
    """The files of a run that are left out.

    Args:
        shared: the names of those that are not, which are checked by what they are.

    Raises:
        ValueError: there are weights in pickles, or recordings and tables that may be of patients.
    """
    left_out = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        name = "/".join(parts)
        if not path.is_file() or name in shared or any(matches(part, FOLDERS_NOT_SHARED) for part in parts[:-1]):
            continue
        left_out.append(name)
        if matches(path.name, NOT_SHARED):
            continue
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which may run anything where it is read; save weights as safetensors, with save_pretrained, "
                "and move it away."
            )
        with path.open("rb") as file:
            content = file.read(4096)  # enough for format_of, which goes by the beginning
        ecg_format = format_of(content)
        if PAGES.match(content) or (ecg_format == "CSV" and path.suffix not in TABLES):
            ecg_format = None  # a page or picture, or any text with commas
        if path.suffix in TABLES or ecg_format:
            raise ValueError(
                f"{path} looks like data of patients ({ecg_format or 'a table or recording'}); nothing was shared. Move it out of the "
                "folder."
            )
    return left_out


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a mask as large as the weights."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())  # both are NaN where one value is


def check_weights(folder: Path, names: Collection[str]) -> None:
    """Reads files of weights.

    Args:
        names: of the files in the folder.

    Raises:
        ValueError: there are none, one is no file of safetensors, lacks others of its index, has weights that are NaN or infinite,
            or what it says beside them names somebody.
    """
    if not names:
        raise ValueError(f"{folder} has no weights in safetensors; save them with save_pretrained.")
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:  # opening it checks the header
                keys, metadata = list(file.keys()), file.metadata() or {}
                diverged = next((key for key in keys if not _is_finite(file.get_tensor(key))), None)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / name} is no file of safetensors, or damaged ({error}); save it again, with save_pretrained."
            ) from error
        check_text(folder / name, "\n".join([*keys, *(f"{key}: {text}" for key, text in metadata.items())]))
        if diverged is not None:
            raise ValueError(
                f"{diverged} in {folder / name} has NaN or infinite values: the training diverged. Nothing was shared; train again with a "
                "lower learning rate."
            )
    for index in folder.glob("*.safetensors.index.json"):
        absent = sorted(set(read_json(index).get("weight_map", {}).values()) - set(names))
        if absent:
            raise ValueError(f"{folder} lacks {', '.join(absent)}, which {index.name} names; save the model again.")


def _parts(value: Any) -> Iterator[tuple[str | None, Any]]:
    """Every key and plain value of JSON, of all depths."""
    for key, part in value.items() if isinstance(value, dict) else ((None, part) for part in value):
        if isinstance(part, dict | list):
            yield key, None
            yield from _parts(part)
        else:
            yield key, part


def check_results(path: Path) -> list[str]:
    """Checks the results of an evaluation.

    Returns:
        The names of its data and model, which the user has given them: they are no texts of records.

    Raises:
        ValueError: a key or a text stands for somebody.
    """
    results = read_json(path)
    parts = list(_parts(results))
    personal = sorted(PERSONAL & {str(key).lower() for key, _ in parts})
    if personal:
        raise ValueError(f"{path} holds {', '.join(personal)}, which may name patients; take it out before sharing.")
    data = results.get("data")
    names = data.get("names", []) if isinstance(data, dict) else []
    # the name of an evaluation ends in a digest, which may look like a date
    own_names = [str(name) for name in [*names, results.get("model"), results.get("evaluation")] if name]
    not_texts = [*(results.get("packages") or {}).values(), results.get("model_revision")]  # versions look like dates
    check_text(path, "\n".join(text for _, text in parts if isinstance(text, str) and text not in not_texts), own_names)
    return own_names


def check_page(path: Path, page: str, own_names: Iterable[str]) -> None:
    """As `check_text`, of what a reader of the HTML sees."""
    check_text(path, html.unescape(re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", page)), own_names)


def check_text(path: Path, text: str, own_names: Iterable[str] | None = None) -> None:
    """Looks for what must not be shared.

    Args:
        path: names the text in messages.
        own_names: for a text that quotes records, its parts that are not from records. Dates are then refused too.

    Raises:
        ValueError: the text names somebody, a date of a record, a folder of this machine or a secret.
    """
    for name in sorted(own_names or (), key=len, reverse=True):  # longest first: one may hold another
        text = text.replace(name, " ")
    check_secrets(path, text)
    if match := PASSWORD.search(text):
        raise ValueError(f"{path} has a password or key, {match[0][:12]}...: take it out, and change it.")
    if match := NAMES.search(text) or (None if own_names is None else DATES.search(text)):
        raise ValueError(
            f"{path} has {match[0]!r}, which may be of a patient: nothing was shared. Take it out, of the data first if it stands in "
            "questions or answers."
        )


def check_secrets(path: Path, text: str) -> None:
    """ValueError if the text, which `path` names in the message, holds a secret or a folder of this machine."""
    if match := TOKEN.search(text):
        raise ValueError(f"{path} has a token or key, {match[0][:6]}...: take it out, and revoke it.")
    if match := LOCAL_PATH.search(text):
        raise ValueError(f"{path} has {match[0]!r}, a folder of this machine: nothing was shared. Take it out.")


def without_local_paths(path: Path) -> bytes | Path:
    """A configuration without the folders that its parts were once loaded from, which tell of the one who trained it.

    Raises:
        ValueError: it is no JSON object.
    """

    def is_local(key: str, value: Any) -> bool:
        if not isinstance(value, str) or not value:
            return False
        local_name = key in ("_name_or_path", "name_or_path") and not on_hub(value)
        return local_name or LOCAL_PATH.match(value) is not None or (value.count("/") > 1 and Path(value).is_absolute())

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(part) for key, part in value.items() if not is_local(key, part)}
        return [clean(part) for part in value] if isinstance(value, list) else value

    config = read_json(path)
    cleaned = clean(config)
    return path if cleaned == config else (json.dumps(cleaned, indent=2, sort_keys=True) + "\n").encode()
