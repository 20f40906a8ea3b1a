"""`elm push`: shares a model, adapter, encoder, tokenizer or dataset on the Hub, in one commit."""

import argparse
import fnmatch
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    ModelCard,
    RepoCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

from configuration_elm import ENCODER_CONFIGS, ELMConfig
from ecg_formats import format_of
from ecg_utils import STANDARD_LEADS
from feature_extraction_elm import ECGFeatureExtractor
from processing_elm import ELMProcessor
from tokenization_ecg_byte import FILE_NAME, ECGByteTokenizer
from training.cards import CARD, PREPROCESSOR, SAMPLE, citation, folder_card, on_hub, replace_section, use_of
from training.hub import refusal, repo_for
from training.synthetic import Findings, simulate_ecg

# what a repo is made of beside its code, its card and the sample
FILES = ["config.json", "generation_config.json", "adapter_config.json", "processor_config.json", "chat_template.jinja"]
FILES += ["*.safetensors", "*.safetensors.index.json", PREPROCESSOR, FILE_NAME]
FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
FILES += ["merges.txt", "tokenizer.model", "evaluation_results.json", "report.html"]
LICENCES = ["LICENSE*", "NOTICE*"]  # where they are in the repo alone, they stay
# what `elm data build` writes
DATASET_FILES = ["data/*.parquet"]
# what a run leaves in its folder and nobody needs: states of training, logs, and answers, which quote the data
NOT_SHARED = ["training_args.bin", "trainer_state.json", "*_results.json", "predictions*.jsonl", "*.log"]
FOLDERS_NOT_SHARED = ["checkpoint-*", "runs", "logs", "wandb", "base_model", "__pycache__", ".*"]
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
TABLES = {".csv", ".tsv", ".parquet", ".arrow", ".jsonl", ".xlsx", ".hea", ".dat"}
# keys of JSON that stand for somebody
PERSONAL = {"patient_id", "patient_name", "record_id", "birth_date", "date_of_birth", "birthdate", "mrn", "recorded_at"}
# what in text stands for somebody: DICOM's and HL7's NAME^NAME, fields of a form, and in quotations of records dates
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
NAMES = re.compile(
    r"\b[A-Z][A-Za-z'-]+\^[A-Z][A-Za-z'-]*"
    r"|\b(?i:(?:patient|first|last|family|given|sur)(?:'s)?[ _-]?name|date of birth|birth ?date|dob|mrn|medical record (?:number|no))\b"
    r"[\"']?\s*[:=#]\s*[\"']?\w[^\n<\"']{0,40}"
)
DATES = re.compile(
    r"\b(?:19|20)\d\d[-/.](?:0?[1-9]|1[0-2])[-/.](?:0?[1-9]|[12]\d|3[01])\b"
    r"|\b(?:0?[1-9]|[12]\d|3[01])[-/.](?:0?[1-9]|[12]\d|3[01])[-/.](?:19|20)\d\d\b"
    rf"|\b(?i:(?:\d{{1,2}}[-. ]{{1,2}}{_MONTH}|{_MONTH}[-. ]{{1,2}}\d{{1,2}})[-,. ]{{1,2}}(?:19|20)\d\d)\b"
)
EXAMPLES = "<h2>Examples</h2>"


def kind_of(folder: Path) -> str:
    """`model`, `adapter`, `encoder`, `tokenizer` or `dataset`.

    Raises:
        ValueError: it is none of these.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; expected that of a saved model, adapter, encoder, tokenizer or dataset."
        )
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if model_type == ELMConfig.model_type:
            return "model"
        if model_type in ENCODER_CONFIGS:
            return "encoder"
        raise ValueError(
            f"{folder / 'config.json'} is of a {model_type!r} model; expected {ELMConfig.model_type} or one of "
            f"{', '.join(ENCODER_CONFIGS)}. Share others with `hf upload`."
        )
    if (folder / FILE_NAME).is_file():
        return "tokenizer"
    if list((folder / "data").glob("*.parquet")):
        return "dataset"
    raise ValueError(
        f"{folder} has no config.json, adapter_config.json, {FILE_NAME} or data/*.parquet; expected the folder of a saved model, "
        "adapter, encoder, tokenizer or dataset."
    )


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_folder(folder: Path) -> list[str]:
    """The files that are left out.

    Raises:
        ValueError: there are weights in pickles, or recordings and tables that may be of patients.
    """
    left_out = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(_matches(part, FOLDERS_NOT_SHARED) for part in parts[:-1]):
            continue
        name = "/".join(parts)
        # the Trainer's own results are not the evaluation's
        shared = len(parts) == 1 and (
            _matches(name, FILES + LICENCES) or path.suffix == ".py" or name in (CARD, SAMPLE)
        )
        if shared:
            continue
        if _matches(path.name, NOT_SHARED):
            left_out.append(name)
            continue
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which may run anything where it is read; save weights as safetensors, with save_pretrained, "
                "and move it away."
            )
        with path.open("rb") as file:
            content = file.read(4096)
        found = format_of(content)
        if found == "CSV" and path.suffix not in TABLES:
            found = None  # any text with commas
        if path.suffix in TABLES or found:
            raise ValueError(
                f"{path} looks like data of patients ({found or 'a table or recording'}); nothing was shared. Move it out of the "
                "folder."
            )
        left_out.append(name)
    return left_out


def check_dataset(folder: Path) -> None:
    """ValueError if there is anything in the folder of a dataset but the dataset and its card."""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    others = [name for name in files if name != CARD and not (name.count("/") == 1 and _matches(name, DATASET_FILES))]
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(others[:5])}{'...' if len(others) > 5 else ''}; only {CARD} and data/*.parquet are pushed. "
            "Move the others away, or nobody knows what is shared."
        )


def check_results(path: Path) -> None:
    """ValueError if a JSON file has a key that stands for somebody."""

    def keys(value: Any) -> set[str]:
        if isinstance(value, Mapping):
            return {str(key).lower() for key in value} | {key for part in value.values() for key in keys(part)}
        return {key for part in value for key in keys(part)} if isinstance(value, list) else set()

    found = PERSONAL & keys(json.loads(path.read_text(encoding="utf-8")))
    if found:
        raise ValueError(
            f"{path} holds {', '.join(sorted(found))}, which may name patients; take it out before sharing."
        )


def check_text(path: Path, text: str, quotes: bool = False) -> None:
    """ValueError if a text names somebody, or where it `quotes` records, tells a date."""
    found = NAMES.search(text) or (DATES.search(text) if quotes else None)
    if found:
        raise ValueError(
            f"{path} has {found[0]!r}, which may be of a patient: nothing was shared. Take it out, of the data first if it stands in "
            "questions or answers."
        )


def code_of(folder: Path) -> dict[str, bytes]:
    """The modules that the folder's configurations name, and those that these import.

    Raises:
        ValueError: one is not there.
    """
    modules = set()
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        for part in parts:
            entries = [*(part.get("auto_map") or {}).values()]
            entries += [pipeline["impl"] for pipeline in (part.get("custom_pipelines") or {}).values()]
            flat = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]
            modules |= {one.split("--")[-1].split(".")[0] for one in flat if one}
    code = {}
    for module in sorted(modules):
        path = folder / f"{module}.py"
        try:
            for file in [path, *map(Path, get_relative_import_files(path))]:
                code[file.name] = file.read_bytes()
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} lacks {Path(error.filename).name}, which its configuration needs; save it again with save_pretrained."
            ) from error
    return code


def sample_ecg(sampling_rate: float, num_samples: int, num_leads: int = 12) -> bytes:
    """A simulated normal record as an .npz file, the same each time; of 100 Hz at least, which lasts as long."""
    rate = max(100, round(sampling_rate))
    num_samples = round(num_samples * rate / sampling_rate)
    findings, rng = Findings(noise=0.002, wander=0.02), np.random.default_rng(0)
    ecg = simulate_ecg(findings, rng, sampling_rate=rate, seconds=max(5.0, num_samples / rate))
    stream = io.BytesIO()
    array, lead_names = np.rint(1000 * ecg[:num_leads, :num_samples]).astype(np.int16), STANDARD_LEADS[:num_leads]
    np.savez_compressed(stream, array=array, sampling_rate=rate, lead_names=np.array(lead_names), unit="uV")
    return stream.getvalue()


def gather(folder: Path, kind: str) -> dict[str, bytes | Path]:
    """Path in the repo -> content, without the card.

    Raises:
        ValueError: weights are not safetensors, code is missing, or results may name patients.
    """
    if kind == "dataset":
        return {path.relative_to(folder).as_posix(): path for path in sorted((folder / "data").glob("*.parquet"))}
    if kind == "tokenizer":
        with tempfile.TemporaryDirectory() as code:
            custom_object_save(ECGByteTokenizer, code)
            modules = {path.name: path.read_bytes() for path in Path(code).glob("*.py")}
        rate = round(ECGByteTokenizer.from_pretrained(folder).sampling_rate or 250)
        return {FILE_NAME: folder / FILE_NAME, SAMPLE: sample_ecg(rate, 10 * rate), **modules}
    files: dict[str, bytes | Path] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and _matches(path.name, FILES + LICENCES)
    }
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise ValueError(f"{folder} has no weights in safetensors; save them with save_pretrained.")
    name = "adapter_config.json" if kind == "adapter" else "config.json"
    files[name] = without_local_paths(folder / name)
    files |= code_of(folder)
    if "evaluation_results.json" in files:
        path = folder / "evaluation_results.json"
        check_results(path)
        check_text(path, path.read_text(encoding="utf-8"), quotes=True)
    if "report.html" in files:  # its examples are recordings
        page = (folder / "report.html").read_text(encoding="utf-8").partition(EXAMPLES)
        check_text(folder / "report.html", page[0], quotes=True)
        files["report.html"] = (page[0] + ("</html>\n" if page[1] else "")).encode()
    if kind == "encoder" and PREPROCESSOR not in files:
        config = _encoder_config(folder)
        files[SAMPLE] = sample_ecg(max(100, config.num_samples / 10), config.num_samples, config.num_leads)
        return files
    if kind == "encoder":
        extractor = ECGFeatureExtractor.from_pretrained(folder)
    elif "processor_config.json" in files:
        extractor = ELMProcessor.from_pretrained(folder).feature_extractor
    else:
        raise ValueError(f"{folder} has no processor; save it beside the model, processor.save_pretrained.")
    files[SAMPLE] = sample_ecg(extractor.sampling_rate, extractor.num_samples)
    return files


def without_local_paths(path: Path) -> bytes:
    """A configuration without the folders that its parts were once loaded from, which tell of the one who trained it."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            paths = {key for key in ("_name_or_path", "name_or_path") if value.get(key) and not on_hub(value[key])}
            return {key: clean(part) for key, part in value.items() if key not in paths}
        return [clean(part) for part in value] if isinstance(value, list) else value

    config = clean(json.loads(path.read_text(encoding="utf-8")))
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _encoder_config(folder: Path) -> Any:
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    return ENCODER_CONFIGS[model_type].from_pretrained(folder)


def read_card(folder: Path, kind: str, name: str) -> RepoCard:
    if (folder / CARD).is_file():
        card: RepoCard = (DatasetCard if kind == "dataset" else ModelCard).load(folder / CARD)
        check_text(folder / CARD, card.text)
        if kind != "adapter" or "library_name" in card.data.to_dict():
            return card
    if kind == "encoder":
        return folder_card(folder, kind, _encoder_config(folder), name)
    if kind == "model":
        processor = ELMProcessor.from_pretrained(folder)
        return folder_card(folder, kind, ELMConfig.from_pretrained(folder), name, processor)
    raise ValueError(f"{folder} has no card; write its {CARD}, as `elm sft`, `elm tokenizer` and `elm data build` do.")


def set_licence(card: RepoCard, kind: str, args: argparse.Namespace, api: HfApi) -> None:
    """Writes the licence into the card: that of the command line, the card's own, or that of the base model on the Hub.

    Raises:
        ValueError: none of these says one.
    """
    metadata: Any = card.data
    base = metadata.get("base_model")
    if args.license is not None:
        metadata.license = args.license
        metadata.license_name = metadata.license_link = None
    if args.license_link is not None:
        metadata.license_link = args.license_link
    if metadata.license in (None, "unknown") and isinstance(base, str):
        try:
            theirs = api.model_info(base).card_data
        except (HfHubHTTPError, OSError):
            theirs = None
        for name in ("license", "license_name", "license_link"):
            if theirs is not None and theirs.get(name):
                setattr(metadata, name, theirs.get(name))
    if metadata.license in (None, "unknown"):
        nor = f", and nor does {base} on the Hub" if base else ""
        whose = "the language model within" if kind in ("model", "adapter") else "what it was made of"
        raise ValueError(
            f"The card names no licence{nor}. A {kind} is shared under that of {whose}: find it out, and say it with --license, such "
            "as apache-2.0, llama3.2 or cc-by-4.0 (and --license_link)."
        )
    if metadata.license == "other" and not (metadata.get("license_name") or metadata.get("license_link")):
        raise ValueError("--license other needs --license_link, where its text is.")


def commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, bytes | Path],
    card: RepoCard,
    kind: str,
    about: Mapping[str, Any],
    revision: str | None = None,
    pr: bool = False,
) -> str:
    """Makes one commit of the files and the card, if anything is new; returns its hash.

    Args:
        about: what `use_of` has to know.
    """
    repo_type = "dataset" if kind == "dataset" else "model"
    # a tag of the content pins what the card tells to load; it is known before the commit is
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    tag = "main" if pr else f"elm-{digest.hexdigest()[:12]}"
    text = replace_section(str(card), "Use", use_of(kind, repo_id, tag, **about))
    url = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    text = replace_section(text, "How to cite", citation(repo_id.split("/")[-1], kind, url))
    everything = {**files, CARD: text.encode()}
    before: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    old = [sibling.rfilename for sibling in before.siblings or []]
    ours = DATASET_FILES if kind == "dataset" else [*FILES, "*.py"]
    stale = [name for name in old if name not in everything and _matches(name, ours)]
    made = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in sorted(everything.items())),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=f"Upload {kind}",
        repo_type=repo_type,
        revision=revision,
        create_pr=pr,
        parent_commit=None if pr else before.sha,
    )
    if not pr:
        api.create_tag(repo_id, tag=tag, repo_type=repo_type, revision=made.oid, exist_ok=True)
    if made.oid == before.sha:
        print(f"{url} holds all of it already; nothing was sent.")
    elif pr:
        print(f"Pull request {made.pr_url}")
    else:
        print(f"{len(everything)} files in {url}")
    return made.oid


def with_base(
    folder: Path,
    files: dict[str, bytes | Path],
    card: RepoCard,
    args: argparse.Namespace,
    api: HfApi,
    repos: ExitStack,
) -> None:
    """Makes the adapter name a base model of the Hub, and pushes the local one there first, into a repository of `repos`."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if not on_hub(base):
        path = Path(base) if Path(base).is_dir() else folder / "base_model"
        if not path.is_dir():
            raise ValueError(
                f"The adapter's base model {base} is neither a folder nor on the Hub; put it in {folder}/base_model."
            )
        check_folder(path)
        base = args.base_repo_id or f"{args.repo_id}-base"
        base_files = gather(path, "model")
        processor = ELMProcessor.from_pretrained(path)
        base_card = folder_card(path, "model", ELMConfig.from_pretrained(path), base.split("/")[-1], processor)
        for name in ("license", "license_name", "license_link", "base_model"):
            setattr(base_card.data, name, getattr(card.data, name, None))
        repos.enter_context(repo_for(api, base, private=args.private))
        config["revision"] = commit(api, base, base_files, base_card, "model", {"takes_ecgs": processor.takes_ecgs})
    config["base_model_name_or_path"] = base
    metadata: Any = card.data
    metadata.base_model = base
    files["adapter_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def push_space(api: HfApi, repo_id: str, revision: str, adapter: bool, private: bool) -> str:
    """A page on which the model is asked; returns its address."""
    from training.demo import write_space

    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), repo_id, revision, adapter)
        with repo_for(api, repo_id, "space", private=private, space_sdk="gradio"):
            api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Upload demo")
    return f"{api.endpoint}/spaces/{repo_id}"


def about(folder: Path, kind: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """What `use_of` has to know of the folder."""
    if kind in ("model", "adapter"):
        return {"takes_ecgs": ELMProcessor.from_pretrained(folder).takes_ecgs}
    if kind == "encoder":
        return {"prepares": PREPROCESSOR in files}
    if kind == "dataset":
        splits = [re.split("[-.]", Path(name).name)[0] for name in files]
        return {"split": "train" if "train" in splits else splits[0]}
    return {}


def push(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: the folder is none that can be shared, nobody is logged in, or the Hub refuses.
    """
    kind = kind_of(args.run)
    if args.space and kind not in ("model", "adapter"):
        a = "an" if kind == "encoder" else "a"
        raise ValueError(f"--space is a page that asks a model; {args.run} holds {a} {kind}.")
    if args.base_repo_id and kind != "adapter":
        raise ValueError(f"--base_repo_id is of the base model of an adapter; {args.run} holds none. Leave it out.")
    if args.space and args.pr:
        raise ValueError("--space shows what is in the repo, and a pull request is not yet; leave one of them out.")
    if kind == "dataset":
        check_dataset(args.run)
    left_out = check_folder(args.run) if kind != "dataset" else []
    files = gather(args.run, kind)
    api = HfApi()
    card = read_card(args.run, kind, args.repo_id.split("/")[-1])
    if get_token() is None:
        raise ValueError("Nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN.")
    set_licence(card, kind, args, api)
    if left_out:
        print(f"Left out: {', '.join(left_out[:8])}{' ...' if len(left_out) > 8 else ''}. Predictions quote the data.")
    facts, repo_type = about(args.run, kind, files), "dataset" if kind == "dataset" else "model"
    with ExitStack() as repos:
        if not args.pr:  # else of somebody else's
            repos.enter_context(repo_for(api, args.repo_id, repo_type, args.revision, args.private))
        if kind == "adapter":
            with_base(args.run, files, card, args, api, repos)
        pushed = commit(api, args.repo_id, files, card, kind, facts, args.revision, args.pr)
    print(f"It is loaded, pinned to this commit, with\n\n{use_of(kind, args.repo_id, pushed, **facts)}", flush=True)
    if args.space:
        print(f"Demo: {push_space(api, args.repo_id, pushed, kind == 'adapter', args.private)}", flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="elm push", description=__doc__)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a model, LoRA adapter, encoder, ECG-Byte tokenizer or dataset"
    )
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="a repository that others do not see, if it is new")
    parser.add_argument("--revision", metavar="BRANCH", help="made if it is new; default: main")
    parser.add_argument("--pr", action="store_true", help="propose it as a pull request")
    parser.add_argument("--space", action="store_true", help="also a Space on which the model is asked")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="as the Hub spells it; default: the card's, or that of the base model on the Hub",
    )
    parser.add_argument("--license_link", metavar="URL", help="where the licence stands")
    parser.add_argument(
        "--base_repo_id", metavar="OWNER/NAME", help="where an adapter's local base model goes; default: REPO_ID-base"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.repo_id.count("/") != 1:
        raise ValueError(f"--repo_id is {args.repo_id!r}; expected OWNER/NAME.")
    try:
        push(args)
    except HfHubHTTPError as error:
        raise ValueError(refusal(error, args.repo_id, args.revision)) from error


if __name__ == "__main__":
    main()
