"""`elm push`: shares a model, adapter, encoder, tokenizer or dataset on the Hub, in one commit."""

import argparse
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    ModelCard,
    RepoCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import PeftConfig
from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files
from transformers.utils import FEATURE_EXTRACTOR_NAME

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.configuration_elm import ELMConfig, is_own_connector
from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.tokenization_ecg_byte import FILE_NAME, ECGByteTokenizer
from elm_ecg.training.command_line import CommandLineParser, printable
from elm_ecg.training.data.arguments import ALLOW_HELP, DRY_RUN_HELP
from elm_ecg.training.data.synthetic import Findings, simulate_ecg
from elm_ecg.training.digest import MODEL_FILES, base_of_adapter, digest_of_folder
from elm_ecg.training.evaluation.card import with_evaluations
from elm_ecg.training.evaluation.results import EVALUATIONS, REPORT_FILE, RESULTS_FILE, read_results, results_in
from elm_ecg.training.files import read_json, resource
from elm_ecg.training.markdown import CARD, CITATION, SAMPLE, citation, on_hub, replace_section, use_of
from elm_ecg.training.model_files import encoder_class_in, is_own_encoder, loading
from elm_ecg.training.sharing.cards import elm_card, encoder_card
from elm_ecg.training.sharing.contents import check_contents, module_file, own_file
from elm_ecg.training.sharing.dataset_disclosure import DATASET_FILES, DATASET_FOLDERS, check_dataset, describe_dataset
from elm_ecg.training.sharing.disclosure import (
    PICKLES,
    check_folder,
    check_page,
    check_results,
    check_text,
    check_weights,
    matches,
    without_local_paths,
)
from elm_ecg.training.sharing.ecg_byte_import import ORDER_FILE
from elm_ecg.training.sharing.hub import NETWORK_ERRORS, refusal, repo_for

MODULES = {path.name for path in resource("").glob("[!_]*.py")}  # that travel with models
# what a repo is made of beside its code, its card and the sample
FILES = [*MODEL_FILES, RESULTS_FILE, REPORT_FILE, *(f"{EVALUATIONS}/*/{name}" for name in (RESULTS_FILE, REPORT_FILE))]
# of these, what a folder of one kind may have of another, and nobody needs
NOT_OF = {"model": ["adapter_*"], "adapter": ["config.json", "generation_config.json", "model*"]}
NOT_OF["encoder"] = ["adapter_*", "generation_config.json", "processor_config.json", "chat_template.jinja", FILE_NAME]
NOT_OF["encoder"] += ["*token*", "vocab.*", "merges.txt", "*.model"]
LICENCES = ["LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md"]
PEFT_TAG = r"base_model:\w+:[^\s'\"]+"  # that PEFT adds to cards, with the folder of the base
MAX_NAMES = 40  # of files left out that are listed
EXAMPLES = "<h2>Examples</h2>"  # the heading of the part of a report that shows recordings
LICENCE_FIELDS = ("license", "license_name", "license_link")  # of a card's metadata


def _kind_of_files(files: Collection[str], config: Callable[[], Path | str]) -> str | None:
    """As `kind_of`, or "MODEL_TYPE model" of another library; None for anything else.

    Args:
        files: names of files.
        config: gives the path of config.json, where it is among them.
    """
    if "adapter_config.json" in files:
        return "adapter"
    if "config.json" in files:
        settings = read_json(Path(config()))
        model_type = str(settings.get("model_type"))
        kinds = {ELMConfig.model_type: "model"} | dict.fromkeys(ENCODER_CONFIGS, "encoder")
        if FEATURE_EXTRACTOR_NAME in files and is_own_encoder(settings):
            return "encoder"
        return kinds.get(model_type, f"{model_type} model")
    return "tokenizer" if FILE_NAME in files else None


def kind_of(folder: Path) -> str:
    """`model`, `adapter`, `encoder`, `tokenizer` or `dataset`.

    Raises:
        ValueError: it is none of these.
    """
    kinds = "model, adapter, encoder, tokenizer or dataset"
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected that of a saved {kinds}.")
    config = folder / "config.json"
    kind = _kind_of_files([path.name for path in folder.iterdir() if path.is_file()], lambda: config)
    if kind is None and list((folder / "data").glob("*.parquet")):
        return "dataset"
    if kind is None:
        raise ValueError(
            f"{folder} has no config.json, adapter_config.json, {FILE_NAME} or data/*.parquet; expected the folder of a saved {kinds}."
        )
    if kind == f"{ECGPretrainingConfig.model_type} model":
        raise ValueError(f"{folder} is a pretraining model. Share its encoder alone: elm push {folder / 'encoder'}")
    if kind.endswith(" model"):
        raise ValueError(
            f"{config} is of a {kind}; expected {ELMConfig.model_type} or one of {', '.join(ENCODER_CONFIGS)}. Share others with "
            "`hf upload`."
        )
    return kind


def code_of(folder: Path, kind: str) -> dict[str, bytes]:
    """The modules that the folder's configurations name, and those that these import.

    Raises:
        ValueError: one is not there, or the model's configuration names none.
    """
    modules = set()
    for name in ("config.json", "processor_config.json", FEATURE_EXTRACTOR_NAME, "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name)
        if name == "config.json" and kind in ("model", "encoder") and not config.get("auto_map"):
            raise ValueError(
                f"{folder / name} names no code (auto_map), so that nobody could load it; save the model again with save_pretrained."
            )
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # parts within, of a processor
        for part in parts:
            auto_map, pipelines = (part.get(key) or {} for key in ("auto_map", "custom_pipelines"))
            if not (isinstance(auto_map, dict) and isinstance(pipelines, dict)):
                raise ValueError(f"{folder / name} is damaged: its auto_map and custom_pipelines are no JSON objects.")
            entries = [*auto_map.values()]  # AutoTokenizer has two, slow and fast, or None
            entries += [pipeline.get("impl") for pipeline in pipelines.values() if isinstance(pipeline, dict)]
            classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
            names = {str(name).split("--")[-1].rpartition(".")[0] for name in classes if name}  # REPO--module.Class
            names |= {str(part["connector"]).rpartition(".")[0]} if is_own_connector(part.get("connector")) else set()
            modules |= {module_file(folder, module, folder / name) for module in names}
    code = {}
    for path in sorted(modules):
        try:
            for file in [path, *map(Path, get_relative_import_files(path))]:
                module_file(folder, file.stem if file.parent == folder else str(file.with_suffix("")), path)
                code[file.name] = file.read_bytes()
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} lacks {Path(error.filename).name}, which its configuration needs; save it again with save_pretrained."
            ) from error
    return code


def sample_ecg(sampling_rate: float, num_samples: int, num_leads: int = 12) -> bytes:
    """A simulated normal record as an .npz file, the same each time; of 100 Hz at least, which lasts as long."""
    rate = max(100, round(sampling_rate))  # below it a QRS complex is a few samples
    num_samples = round(num_samples * rate / sampling_rate)
    findings, rng = Findings(noise=0.002, wander=0.02), np.random.default_rng(0)
    ecg = simulate_ecg(findings, rng, sampling_rate=rate, seconds=max(5.0, num_samples / rate))
    stream = io.BytesIO()
    array, lead_names = np.rint(1000 * ecg[:num_leads, :num_samples]).astype(np.int16), STANDARD_LEADS[:num_leads]
    np.savez_compressed(stream, array=array, sampling_rate=rate, lead_names=np.array(lead_names), unit="uV")
    return stream.getvalue()


def gather(folder: Path, kind: str, allowed: Collection[str] = ()) -> dict[str, bytes | Path]:
    """Path in the repo -> content, without the card.

    Args:
        allowed: columns of a dataset, see `check_dataset`.

    Raises:
        ValueError: weights are not safetensors, code is missing, or results may name patients.
    """
    if kind == "dataset":
        check_dataset(folder, allowed)
        tables = sorted(path for part in DATASET_FOLDERS for path in (folder / part).glob("*.parquet"))
        return {path.relative_to(folder).as_posix(): path for path in tables}
    if kind == "tokenizer":
        with tempfile.TemporaryDirectory() as code:
            custom_object_save(ECGByteTokenizer, code)  # the installed code, not that of the folder
            modules = {path.name: path.read_bytes() for path in Path(code).glob("*.py")}
        rate = round(ECGByteTokenizer.from_pretrained(folder).sampling_rate or 250)
        own = {name: folder / name for name in (FILE_NAME, ORDER_FILE) if (folder / name).is_file()}
        return {**own, SAMPLE: sample_ecg(rate, 10 * rate), **modules}
    files: dict[str, bytes | Path] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and matches(path.name, MODEL_FILES + LICENCES) and not matches(path.name, NOT_OF[kind])
    }
    weights = "adapter_model.safetensors" if kind == "adapter" else "model*.safetensors"
    check_weights(folder, [name for name in files if matches(name, [weights])])
    files |= code_of(folder, kind)
    for name in set(files) & set(LICENCES):
        check_text(folder / name, (folder / name).read_text(encoding="utf-8"))
    if kind != "encoder":
        files |= evaluations_of(folder)
    for name in list(files):
        if name.endswith("_config.json") or name == "config.json":
            files[name] = without_local_paths(folder / name)
    if kind == "encoder" and FEATURE_EXTRACTOR_NAME not in files:
        config = _encoder_config(folder)
        files[SAMPLE] = sample_ecg(max(100, config.num_samples / 10), config.num_samples, config.num_leads)
        return files
    if kind != "encoder" and "processor_config.json" not in files:
        raise ValueError(f"{folder} has no processor; save it beside the model, processor.save_pretrained.")
    with loading(folder, f"The {kind} {folder}"):
        if kind == "encoder":
            extractor = ECGFeatureExtractor.from_pretrained(folder)
        else:
            extractor = ELMProcessor.from_pretrained(folder, trust_remote_code=False).feature_extractor
    files[SAMPLE] = sample_ecg(extractor.sampling_rate, extractor.num_samples)
    return files


def check_loads(folder: Path, kind: str, trust_remote_code: bool = False) -> None:
    """Loads a model as every command does, but for the values of its weights, which `check_weights` reads.

    An adapter is loaded on a base that lies here; one of the Hub is not fetched for it.

    Raises:
        ValueError: it cannot be loaded: files are damaged, do not go together, or lack weights.
    """
    from elm_ecg.training.load import load_elm  # late: it imports TRL, and an encoder or tokenizer does without

    base = base_of_adapter(folder) if kind == "adapter" else ""
    if kind == "encoder":
        model_class = encoder_class_in(folder, trust_remote_code)
        with loading(folder, f"The encoder {folder}"):
            model_class.from_pretrained(folder, use_safetensors=True, device_map="meta")
    elif kind == "model" or (base and Path(base).is_dir()):
        load_elm(str(folder), trust_remote_code=trust_remote_code, device_map="meta")
    else:
        with loading(folder, f"The adapter {folder}"):
            PeftConfig.from_pretrained(str(folder))
            ELMProcessor.from_pretrained(folder, trust_remote_code=False)


def evaluations_of(folder: Path) -> dict[str, bytes | Path]:
    """Path in the repo -> the results and reports of a model's evaluations.

    Raises:
        ValueError: they may name patients, or are of other weights than those in the folder.
    """
    files: dict[str, bytes | Path] = {}
    paths = results_in(folder)
    revision = digest_of_folder(folder) if paths else ""
    for path in paths:
        own_names = check_results(path)
        found = read_results(path)["model_revision"]
        if found != revision:
            raise ValueError(
                f"{path} is not about the model beside it: its scores are of {found}, and the files in {folder} are {revision}. Evaluate "
                f"again with `elm evaluate {folder} --data ...`, which moves old results aside, or move it away."
            )
        files[path.relative_to(folder).as_posix()] = path
        report = path.with_name(REPORT_FILE)
        if report.is_file():
            # its examples, which stand last, are recordings
            page, heading, _ = report.read_text(encoding="utf-8").partition(EXAMPLES)
            check_page(report, page, own_names)
            # the end was cut off too
            files[report.relative_to(folder).as_posix()] = (page + ("</html>\n" if heading else "")).encode()
    return files


def _encoder_config(folder: Path, trust_remote_code: bool = False) -> Any:
    with loading(folder, f"The encoder {folder}"):
        return encoder_class_in(folder, trust_remote_code).config_class.from_pretrained(folder)


def read_card(folder: Path, kind: str, name: str, trust_remote_code: bool = False) -> RepoCard:
    """The card of the folder, or of what is known of it.

    Raises:
        ValueError: it is damaged, holds what must not be shared, or is missing and cannot be written.
    """
    path = own_file(folder, folder / CARD)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        check_text(path, re.sub(PEFT_TAG, "", text))
        try:
            card: RepoCard = (DatasetCard if kind == "dataset" else ModelCard)(text)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise ValueError(f"The metadata of {path} are damaged: {error}") from error
        if kind != "adapter" or card.data.get("library_name") is not None:
            found = [read_results(results) for results in results_in(folder)] if kind in ("model", "adapter") else []
            return ModelCard(with_evaluations(text, found, name)) if found else card
    if kind == "encoder":
        return encoder_card(folder, _encoder_config(folder, trust_remote_code), name)
    if kind == "model":
        processor = ELMProcessor.from_pretrained(folder)
        return elm_card(folder, ELMConfig.from_pretrained(folder), name, processor)
    raise ValueError(f"{folder} has no card; write its {CARD}, as `elm sft`, `elm tokenizer` and `elm data build` do.")


def set_licence(card: RepoCard, kind: str, args: argparse.Namespace, api: HfApi) -> None:
    """Writes the licence into the card: that of the command line, the card's own, or that of the base model on the Hub.

    Raises:
        ValueError: none of these names one.
    """
    metadata: Any = card.data
    if args.license is not None:
        metadata.license = args.license
        metadata.license_name = metadata.license_link = None  # these belonged to the card's former licence
    if args.license_link is not None:
        metadata.license_link = args.license_link
    base = metadata.get("base_model")
    why_not_of_base = ""
    if metadata.license in (None, "unknown") and isinstance(base, str) and on_hub(base):
        why_not_of_base = f", and nor does {base} on the Hub"
        of_base: Any = None
        try:
            of_base = api.model_info(base).card_data
        except RepositoryNotFoundError:
            pass  # gone or private: as one without a licence
        except NETWORK_ERRORS as error:
            why_not_of_base = f", and {base} cannot be asked ({type(error).__name__})"
        for name in LICENCE_FIELDS:
            if of_base is not None and of_base.get(name):
                setattr(metadata, name, of_base.get(name))
    if metadata.license in (None, "unknown"):
        origin = "the language model within" if kind in ("model", "adapter") else "what it was made of"
        raise ValueError(
            f"The card names no licence{why_not_of_base}. A {kind} is shared under that of {origin}: find it out, and give it as --license, such "
            "as apache-2.0, llama3.2 or cc-by-4.0 (and --license_link)."
        )
    if metadata.license == "other" and not (metadata.get("license_name") or metadata.get("license_link")):
        raise ValueError("--license other needs --license_link, where its text is.")


def kind_of_repo(api: HfApi, repo_id: str, revision: str, files: Collection[str]) -> str | None:
    """What a repository of models holds: as `kind_of`, or in words what else; None if nothing yet."""
    kind = _kind_of_files(files, lambda: api.hf_hub_download(repo_id, "config.json", revision=revision))
    weights = [name for name in files if name.endswith((".safetensors", ".gguf", ".onnx", *PICKLES))]
    return kind or (f"file {weights[0]}" if weights else None)


def commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, bytes | Path],
    card: RepoCard,
    kind: str,
    facts: Mapping[str, Any],
    own_commits: set[str],
    revision: str | None = None,
    pr: bool = False,
) -> str:
    """Makes one commit of the files and the card, if anything is new; returns its hash.

    What an earlier push left and this one has not goes; what others put there stays.

    Args:
        facts: what `use_of` has to know.
        own_commits: gets the commit's hash, see `repo_for`.

    Raises:
        ValueError: the repository holds something else.
    """
    repo_type = "dataset" if kind == "dataset" else "model"
    url = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    before: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    old_files = [sibling.rfilename for sibling in before.siblings or []]
    held = kind if kind == "dataset" else kind_of_repo(api, repo_id, before.sha, old_files)
    if held not in (kind, None):
        raise ValueError(f"{url} holds the {held} of another push; name another repository for this {kind}.")
    # a tag of the content pins what the card tells to load; it is known before the commit is
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    tag = f"elm-{digest.hexdigest()[:12]}"
    if pr and not api.revision_exists(repo_id, tag, repo_type=repo_type):
        tag = "main"  # whoever takes the pull request does not tag it
    text = replace_section(str(card), "Use", use_of(kind, repo_id, tag, **facts))
    if CITATION in text:
        text = replace_section(text, "How to cite", citation(repo_id.split("/")[-1], kind, url))
    new_files = {**files, CARD: text.encode()}
    if kind == "dataset":
        pushed = {name for name in old_files if re.fullmatch(DATASET_FILES, name)}
    else:
        ours = {depth: [pattern for pattern in FILES if pattern.count("/") == depth] for depth in range(3)}
        pushed = {name for name in old_files if matches(name, ours.get(name.count("/"), ())) or name in MODULES}
    stale = sorted(pushed - new_files.keys())  # an earlier push made them
    made = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in sorted(new_files.items())),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=f"Upload {kind}",
        repo_type=repo_type,
        revision=revision,
        create_pr=pr,
        parent_commit=None if pr else before.sha,  # refused if somebody else has written meanwhile
    )
    own_commits.add(made.oid)  # by it repo_for knows them from those of others
    if stale:
        print(f"Removed, as it is no longer in the folder: {', '.join(stale)}")
    if made.oid == before.sha:  # huggingface_hub makes no empty commit
        print(f"{url} holds all of it already; nothing was sent.")
    elif pr:
        print(f"Pull request {made.pr_url}")
    else:
        print(f"{len(new_files)} files in {url}")
    if not pr:
        api.create_tag(repo_id, tag=tag, repo_type=repo_type, revision=made.oid, exist_ok=True)
    return made.oid


def with_base(
    folder: Path, files: dict[str, bytes | Path], card: RepoCard, args: argparse.Namespace, api: HfApi, repos: ExitStack
) -> None:
    """Makes the adapter name a base model of the Hub, and pushes the local one there first, into a repository of `repos`."""
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    cleaned = files["adapter_config.json"]  # without local paths
    config = json.loads(cleaned if isinstance(cleaned, bytes) else cleaned.read_bytes())
    place = Path(base_of_adapter(folder))
    local = place if base and place.is_dir() else None
    metadata: Any = card.data
    if local is not None:
        if args.pr and args.base_repo_id is None:
            raise ValueError(
                f"The adapter's base model {local} is pushed, not proposed: name a repository of yours for it as --base_repo_id."
            )
        base = args.base_repo_id or f"{args.repo_id}-base"
        base_files = gather(local, "model")
        check_contents(local, base_files)
        check_loads(local, "model")
        check_folder(local, base_files)
        base_card = read_card(local, "model", base.split("/")[-1])
        names = [*LICENCE_FIELDS]
        names += ["base_model"] if isinstance(metadata.get("base_model"), str) and on_hub(metadata.base_model) else []
        for name in names:
            setattr(base_card.data, name, metadata.get(name))  # found for the adapter, by set_licence
        own_commits = repos.enter_context(repo_for(api, base, private=args.private))
        facts = facts_of_use(local, "model", base_files)
        config["revision"] = commit(api, base, base_files, base_card, "model", facts, own_commits)
    elif not (on_hub(base) and api.repo_exists(base)):
        raise ValueError(
            f"The adapter's base model {base or 'is not named and'} is neither a folder nor on the Hub; put it in {folder}/base_model."
        )
    config["base_model_name_or_path"] = base  # PEFT loads it from here, at the revision above
    metadata.base_model = base
    metadata.tags = [tag for tag in metadata.get("tags") or [] if not re.match(PEFT_TAG, tag)]
    files["adapter_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def check_space(api: HfApi, repo_id: str) -> None:
    """ValueError if there is a Space of this name that is none of ours."""
    if api.repo_exists(repo_id, repo_type="space") and not api.file_exists(repo_id, "space.json", repo_type="space"):
        raise ValueError(
            f"{api.endpoint}/spaces/{repo_id} is another Space, which --space would overwrite; rename it, or leave --space out."
        )


def push_space(api: HfApi, repo_id: str, revision: str, adapter: bool, private: bool) -> str:
    """A page on which the model is asked; returns its address."""
    from elm_ecg.training.apps.demo import write_space  # late: most pushes make no page

    with tempfile.TemporaryDirectory() as folder, repo_for(api, repo_id, "space", None, private, space_sdk="gradio"):
        write_space(Path(folder), repo_id, revision, adapter)
        api.upload_folder(repo_id=repo_id, repo_type="space", folder_path=folder, commit_message="Upload demo")
    return f"{api.endpoint}/spaces/{repo_id}"


def facts_of_use(folder: Path, kind: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """What `use_of` has to know of the folder."""
    if kind in ("model", "adapter"):
        return {"takes_ecgs": ELMProcessor.from_pretrained(folder).takes_ecgs}
    if kind == "encoder":
        return {"prepares": FEATURE_EXTRACTOR_NAME in files}
    if kind == "dataset":
        splits = [
            re.split("[-.]", Path(name).name)[0] for name in files if name.startswith("data/")
        ]  # of train-00000-of-00001.parquet
        table = pq.read_schema(next((folder / "data").glob("*.parquet")))
        return {"split": "train" if "train" in splits else splits[0], "has_chats": "messages" in table.names}
    return {}


def check_arguments(args: argparse.Namespace, kind: str) -> None:
    """ValueError if the options do not go with each other, or with what is pushed."""
    for name in ("repo_id", "base_repo_id"):
        repo_id = getattr(args, name)
        if repo_id is not None and repo_id.count("/") != 1:
            raise ValueError(f"--{name} is {repo_id!r}; expected OWNER/NAME.")
    a = "an" if kind[0] in "ae" else "a"
    if args.space and kind not in ("model", "adapter"):
        raise ValueError(f"--space is a page that asks a model; {args.run} holds {a} {kind}.")
    if args.base_repo_id and kind != "adapter":
        raise ValueError(f"--base_repo_id is for the base of an adapter; {args.run} holds {a} {kind}. Leave it out.")
    if args.base_repo_id == args.repo_id:
        raise ValueError(f"--base_repo_id and --repo_id are both {args.repo_id}; a base model has its own repository.")
    if args.allow and kind != "dataset":
        raise ValueError(f"--allow is for the columns of a dataset; {args.run} holds {a} {kind}. Leave it out.")
    if args.space and args.pr:
        raise ValueError("--space shows what is in the repo, and a pull request is not yet; leave one of them out.")


def push(args: argparse.Namespace) -> None:
    """Checks everything before anything is sent, and then makes one commit.

    Raises:
        ValueError: the folder is none that can be shared, or nobody is logged in.
        HfHubHTTPError, OSError: the Hub refuses, or cannot be reached.
    """
    kind = kind_of(args.run)
    check_arguments(args, kind)
    files = gather(args.run, kind, args.allow)
    check_contents(args.run, files)
    if kind in ("model", "adapter", "encoder"):
        check_loads(args.run, kind, args.trust_remote_code)
    shared = {*files, CARD, *MODULES}
    left_out = [] if kind == "dataset" else check_folder(args.run, shared)  # of datasets, gather refuses all else
    api = HfApi()
    card = read_card(args.run, kind, args.repo_id.split("/")[-1], args.trust_remote_code)
    print(f"What is shared: {', '.join(sorted({*files, CARD}))}")
    if kind == "dataset":
        print(printable(describe_dataset(args.run)))
    if left_out:
        more = f" and {len(left_out) - MAX_NAMES} more" if len(left_out) > MAX_NAMES else ""
        print(f"Left out: {', '.join(left_out[:MAX_NAMES])}{more}. Predictions quote the data.")
    if args.dry_run:
        if args.license is None and card.data.get("license") in (None, "unknown"):
            base = card.data.get("base_model")
            of_base = (
                f"that of {base} on the Hub is taken; if it names none, "
                if isinstance(base, str) and on_hub(base)
                else ""
            )
            print(f"The card names no licence: {of_base}the push needs --license.")
        print("Nothing was sent, as --dry_run says.", flush=True)
        return
    if get_token() is None:  # the checks before need no Hub
        raise ValueError("Nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN.")
    set_licence(card, kind, args, api)
    if args.space:
        check_space(api, args.repo_id)
    facts, repo_type = facts_of_use(args.run, kind, files), "dataset" if kind == "dataset" else "model"
    with ExitStack() as repos:  # if the adapter fails, the base's repository is put back too
        own_commits: set[str] = set()
        if not args.pr:  # else the repository is somebody else's
            own_commits = repos.enter_context(repo_for(api, args.repo_id, repo_type, args.revision, args.private))
        if kind == "adapter":
            with_base(args.run, files, card, args, api, repos)
        pushed = commit(api, args.repo_id, files, card, kind, facts, own_commits, args.revision, args.pr)
    print(f"It is loaded, pinned to this commit, with\n\n{use_of(kind, args.repo_id, pushed, **facts)}", flush=True)
    if args.space:
        try:
            print(f"Demo: {push_space(api, args.repo_id, pushed, kind == 'adapter', args.private)}", flush=True)
        except NETWORK_ERRORS as error:
            raise ValueError(f"The {kind} is shared, its Space is not: {error}") from error


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm push`."""
    parser = CommandLineParser(prog="elm push", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a model, adapter, encoder, tokenizer, dataset")
    parser.add_argument("--repo_id", required=True, metavar="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository that others cannot see")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where it does not exist; default: main")
    parser.add_argument("--pr", action="store_true", help="propose the files as a pull request")
    parser.add_argument("--dry_run", action="store_true", help=DRY_RUN_HELP)
    parser.add_argument("--trust_remote_code", action="store_true", help="run its own encoder's or connector's code")
    parser.add_argument("--allow", nargs="+", default=[], metavar="COLUMN", help=ALLOW_HELP)
    parser.add_argument("--space", action="store_true", help="also a Space on which the model is asked")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence, as the Hub spells it; default: the card's, or that of the base model on the Hub",
    )
    parser.add_argument("--license_link", metavar="URL", help="address of the licence's text")
    parser.add_argument(
        "--base_repo_id", metavar="OWNER/NAME", help="where an adapter's local base model goes; default: REPO_ID-base"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs `elm push`; what the Hub refuses is one ValueError in words."""
    args = make_parser().parse_args(argv)
    try:
        push(args)
    except NETWORK_ERRORS as error:
        if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError):
            raise  # of a file
        raise ValueError(refusal(error, args.repo_id, args.revision)) from error
