"""Pushes to a loopback Hub, and what a stranger loads from it."""

import io
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from elm_ecg.configuration_ecg_encoders import MERLConfig
from elm_ecg.ecg_utils import REFERENCE_LEADS, lead_quality, limb_lead_error, read_ecg
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import MERLModel
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import cli
from elm_ecg.training.digest import digest_of_folder
from elm_ecg.training.evaluation.results import Results
from elm_ecg.training.load import load_elm
from elm_ecg.training.sharing.hub import NETWORK_ERRORS
from elm_ecg.training.sharing.push import kind_of, main
from helpers import (
    RESULTS,
    environment_of,
    fork_project,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_processor,
    tiny_symbolic_processor,
)
from loopback_hub import LoopbackHub, front_matter, run_on_hub

CASES = ("llava", "fuyu", "symbolic", "rgb", "stacked_signal")


def save(folder: Path, case: str = "llava") -> Path:
    torch.manual_seed(0)
    if case in ("rgb", "stacked_signal"):
        processor, make = tiny_image_processor_elm("vit", case), partial(tiny_image_elm_config, "vit", case)
    elif case == "symbolic":
        processor = tiny_symbolic_processor()
        make = partial(tiny_elm_config, None, representation="symbolic")
    else:
        processor = tiny_processor()
        make = partial(tiny_elm_config, {"llava": "merl", "fuyu": "patch"}[case])
    config = make(ecg_token_id=None if case == "symbolic" else processor.ecg_token_id)
    model = ELMForConditionalGeneration(config)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """An ELM of each kind, an adapter on the first, and an encoder."""
    root = tmp_path_factory.mktemp("push")
    for case in CASES:
        save(root / case, case)
    base = save(root / "adapter" / "base_model")
    model = ELMForConditionalGeneration.from_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(root / "adapter")
    tiny_processor().save_pretrained(root / "adapter")
    card = "---\nlibrary_name: peft\ntags: [elm]\n---\n# adapter\n\n## Use\n\nlater\n\n## Limits\n\nmany\n"
    (root / "adapter" / "README.md").write_text(card)
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/someone/secret/base_model"  # it was moved
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    for name in ("encoder", "prepared"):
        MERLModel(MERLConfig(block="basic", depths=[1, 1], widths=[8, 16], num_samples=500)).save_pretrained(
            root / name
        )
    ECGFeatureExtractor(num_samples=500, lead_names=REFERENCE_LEADS, normalization="minmax").save_pretrained(
        root / "prepared"
    )
    return root


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, which this process knows too."""
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "any")
        yield server


def push(folder: Path, name: str, *options: str) -> None:
    main([str(folder), "--repo_id", f"user/{name}", "--license", "mit", *options])


def commits(hub: LoopbackHub, name: str) -> set[str]:
    return {commit for commit in hub.repos[f"models/user/{name}"] if len(commit) == 40}


LOAD = """
import json, sys, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline

def logits(name, auto_class, revision):
    processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
    model = auto_class.from_pretrained(name, revision=revision, trust_remote_code=True).eval()
    ecg = hf_hub_download(name, "sample_ecg.npz", revision=revision)
    chat = [{"role": "user", "content": [{"type": "ecg", "path": ecg}, {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits

def states(name, auto_class, revision):
    model = auto_class.from_pretrained(name, revision=revision, trust_remote_code=True).eval()
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 6000).reshape(1, 12, 500)).last_hidden_state.contiguous()

found = {}
"""


def local_logits(folder: Path, sample: bytes) -> torch.Tensor:
    model, processor = load_elm(str(folder))
    record = read_sample(sample)
    chat = [{"role": "user", "content": [{"type": "ecg", "ecg": record}, {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


def read_sample(sample: bytes) -> dict:
    with np.load(io.BytesIO(sample)) as file:
        return {
            "array": file["array"],
            "sampling_rate": file["sampling_rate"].item(),
            "lead_names": file["lead_names"].tolist(),
            "unit": file["unit"].item(),
        }


@pytest.mark.slow
def test_a_stranger_loads_what_is_pushed(folders, hub, tmp_path, capsys):
    """By commit and by the card's tag, with every Auto class: the logits are identical.

    In an environment with what the cards ask for and nothing else; adapters, which ask for peft too, in a fresh process.
    """
    missing = ("elm_ecg", "datasets", "scipy", "trl", "peft", "torchvision")
    code = {
        "": [f"import importlib.util\nassert not any(map(importlib.util.find_spec, {missing}))", LOAD],
        "adapter": [LOAD, "from peft import AutoPeftModelForCausalLM"],
    }
    python = {"": environment_of(["torch", "transformers", "numpy", "pillow"], tmp_path / "stranger"), "adapter": None}
    expected = {}
    for case in (*CASES, "adapter", "encoder"):
        push(folders / case, case)
        printed = capsys.readouterr().out
        revision = [commit for commit in hub.repos[f"models/user/{case}"] if len(commit) == 40][-1]
        assert f'"user/{case}", "{revision}"' in printed
        card = hub.files(f"user/{case}")["README.md"].decode()
        assert card in hub.cards  # the Hub has validated it
        ModelCard(card).validate()
        classes = ["AutoModelForCausalLM", *(["AutoModelForImageTextToText"] if case in ("llava", "rgb") else [])]
        classes = {"adapter": ["AutoPeftModelForCausalLM"], "encoder": ["AutoModel"]}.get(case, classes)
        function = "states" if case == "encoder" else "logits"
        for auto_class in classes:
            loads = f"found['{case} {auto_class}'] = {function}('user/{case}', {auto_class}, '{revision}')"
            code["adapter" if case == "adapter" else ""].append(loads)
            if case == "encoder":
                with torch.no_grad():
                    ecg_values = torch.linspace(-1, 1, 6000).reshape(1, 12, 500)
                    states = MERLModel.from_pretrained(folders / case).eval()(ecg_values).last_hidden_state
                expected[f"{case} {auto_class}"] = states
            else:
                sample = hub.files(f"user/{case}")["sample_ecg.npz"]
                expected[f"{case} {auto_class}"] = local_logits(folders / case, sample)
    shutil.copytree(Path(cli.__file__).parent / "tokenizers" / "ptbxl_250hz", tmp_path / "tokenizer")
    push(tmp_path / "tokenizer", "tokenizer")
    push(folders / "prepared", "prepared")
    assert "I, II, III, aVL, aVR, aVF" in hub.files("user/prepared")["README.md"].decode()
    for name in (*CASES, "encoder", "prepared", "tokenizer"):
        blocks = hub.files(f"user/{name}")["README.md"].decode().split("```python\n")[1:]
        assert blocks
        code[""] += [block.split("\n```")[0] for block in blocks]  # the cards' snippets run as they stand
    code[""].append(
        "print(json.dumps(['config', AutoConfig.from_pretrained('user/fuyu', trust_remote_code=True).architecture]))"
    )
    code[""].append("print('of 12 leads', again.shape, len(ids) > 100)")
    found, output = {}, ""
    for case, lines in code.items():
        lines.append("save_file(found, 'found.safetensors')")
        output += run_on_hub("\n".join(lines), hub, tmp_path, python[case], project=False)
        found |= load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    for case, values in found.items():
        # of an adapter only the order of the sum differs: it is merged here, and beside its base there
        torch.testing.assert_close(values, expected[case], rtol=0, atol=1e-6 if "adapter" in case else 0)
    assert '["config", "fuyu"]' in output
    assert "[{'answer': " in output
    assert output.count("torch.Size([1, ") == 2
    assert "of 12 leads (12, 2500) True" in output
    base = json.loads(hub.files("user/adapter")["adapter_config.json"])
    assert base["base_model_name_or_path"] == "user/adapter-base"
    assert base["revision"] in commits(hub, "adapter-base")
    assert "secret" not in str(hub.repos)


@pytest.fixture
def model(folders, tmp_path) -> Path:
    return shutil.copytree(folders / "fuyu", tmp_path / "run")


def test_what_is_sent_and_what_is_not(model, hub, capsys):
    for name in ("training_args.bin", "predictions.jsonl", "trainer_state.json", "notes.txt"):
        (model / name).write_bytes(b"x")
    (model / "checkpoint-3").mkdir()
    (model / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    (model / "mine.py").write_text("password = 1")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "/home/someone/secret/llm"
    (model / "config.json").write_text(json.dumps(config))
    place = save_results(model, model / "evaluation" / "mine")
    (place / "report.html").write_text("<h2>Scores</h2>\n<h2>Examples</h2>\nrecord 17</html>\n")
    save_results(model, model / "old_results" / "1")
    push(model, "model")
    files = hub.files("user/model")
    assert {
        "model.safetensors",
        "pipeline_elm.py",
        "sample_ecg.npz",
        "evaluation/mine/evaluation_results.json",
    } <= files.keys()
    assert not {"training_args.bin", "predictions.jsonl", "trainer_state.json", "notes.txt", "mine.py"} & files.keys()
    assert not any("checkpoint" in name or "predictions" in name or "old_results" in name for name in files)
    assert b"secret" not in files["config.json"]
    assert files["evaluation/mine/report.html"] == b"<h2>Scores</h2>\n</html>\n"
    assert "predictions.jsonl" in capsys.readouterr().out
    assert front_matter(files["README.md"].decode())["license"] == "mit"
    record = read_sample(files["sample_ecg.npz"])
    assert record["array"].shape == (12, 500)


def save_results(model: Path, folder: Path, **changes: Any) -> Path:
    """Results of the model, as `elm evaluate` leaves them in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    Results({**RESULTS, "model_revision": digest_of_folder(model), **changes}).save(folder)
    return folder


@pytest.mark.parametrize("changed", ["model.safetensors", "chat_template.jinja", "processor_config.json"])
def test_results_of_another_model_are_not_shared(model, hub, changed):
    """As training into the same folder would leave them."""
    place = save_results(model, model / "evaluation" / "mine")
    before = json.loads((place / "evaluation_results.json").read_text())["model_revision"]
    content = (model / changed).read_bytes()
    other = content[:-1] + bytes([content[-1] ^ 1]) if changed == "model.safetensors" else content + b"\n"
    (model / changed).write_bytes(other)
    message = f"its scores are of {before}, and the files in .* are {digest_of_folder(model)}. Evaluate again with `elm evaluate"
    with pytest.raises(ValueError, match=message):
        push(model, "model")
    assert hub.repos == {}


def test_evaluations_that_are_gone_go_from_the_hub_too(model, hub):
    for name in ("a", "b"):
        save_results(model, model / "evaluation" / name)
    push(model, "model")
    names = {f"evaluation/{name}/evaluation_results.json" for name in "ab"}
    assert names <= hub.files("user/model").keys()
    shutil.rmtree(model / "evaluation" / "a")
    push(model, "model")
    assert names & hub.files("user/model").keys() == {"evaluation/b/evaluation_results.json"}


def test_again_and_changed(model, hub, capsys):
    """The same content makes no commit; what is no longer there goes; a branch is a branch."""
    push(model, "model")
    before = commits(hub, "model")
    capsys.readouterr()
    push(model, "model")
    assert "nothing was sent" in capsys.readouterr().out
    assert commits(hub, "model") == before
    card = hub.files("user/model")["README.md"].decode()
    tag = card.split('"user/model", "')[1].split('"')[0]
    assert hub.files("user/model", tag)["model.safetensors"] == (model / "model.safetensors").read_bytes()
    (model / "generation_config.json").unlink()
    hub.commit("models/user/model", "main", hub.files("user/model") | {"LICENSE": b"mit", "ours.txt": b"x"})
    push(model, "model", "--revision", "next")
    assert {"LICENSE", "ours.txt"} <= hub.files("user/model", "next").keys()
    assert "generation_config.json" not in hub.files("user/model", "next")
    assert "generation_config.json" in hub.files("user/model")
    push(model, "hidden", "--private")
    assert hub.private == {"models/user/hidden"}


def test_a_failure_midway_leaves_the_remote_as_it_was(model, hub, capsys, monkeypatch):
    push(model, "model")
    before = dict(hub.files("user/model"))
    (model / "generation_config.json").write_text("{}")
    hub.broken_commits = 100
    with pytest.raises(ValueError, match=r"The Hub refused \(500\): .*the commit failed.* Push again"):
        push(model, "model")
    assert hub.files("user/model") == before
    hub.broken_commits = 0
    push(model, "model")
    assert hub.files("user/model")["generation_config.json"] == b"{}"


@pytest.mark.parametrize("failure", [ConnectionError("no network"), KeyboardInterrupt()])
@pytest.mark.slow
def test_a_failure_leaves_nothing_new(failure, model, folders, hub, monkeypatch):
    """Neither a repository, a branch, a Space nor the base model of an adapter."""
    push(model, "old")
    before = {repo: dict(revisions) for repo, revisions in hub.repos.items()}

    def fail(*args, **kwargs):
        raise failure

    def refuses(folder, name, *options):
        with pytest.raises(type(failure)):
            push(folder, name, *options)
        assert hub.repos == before

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", fail)
        refuses(model, "new")
        refuses(model, "new", "--revision", "next")
        refuses(model, "old", "--revision", "next")
    real = HfApi.create_commit

    def fail_at_the_adapter(api, repo_id, *args, **kwargs):
        return real(api, repo_id, *args, **kwargs) if repo_id.endswith("-base") else fail()

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", fail_at_the_adapter)
        refuses(folders / "adapter", "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", fail)
        with pytest.raises((ValueError, KeyboardInterrupt), match=r"The model is shared, its Space is not|^$"):
            push(model, "old", "--space")
        assert hub.repos == before


def test_what_others_have_written_stays(model, hub, monkeypatch, capsys):
    """Of a new repository, a colleague's commit during our push; of one that was there, files that no push makes."""

    def somebody_else(api, repo_id, *args, **kwargs):
        hub.commit("models/user/new", "main", {"theirs.txt": b"x"})
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", somebody_else)
        with pytest.raises(ConnectionError):
            push(model, "new")
    assert hub.files("user/new") == {"theirs.txt": b"x"}
    assert "user/new stays as it is: somebody else has written to it meanwhile." in capsys.readouterr().out
    push(model, "new")
    others = {"examples/train.py": b"1", "onnx/model.safetensors": b"2", "handler.py": b"3", "report.html": b"ours"}
    hub.commit("models/user/new", "main", hub.files("user/new") | others)
    push(model, "new")
    assert hub.files("user/new").keys() >= {"theirs.txt", *others} - {"report.html"}
    assert "report.html" not in hub.files("user/new")


def test_a_commit_of_somebody_else_during_ours(model, hub, monkeypatch):
    push(model, "model")
    (model / "generation_config.json").write_text("{}")
    real = HfApi.create_commit

    def late(api, *args, **kwargs):
        hub.commit("models/user/model", "main", hub.files("user/model") | {"model.safetensors": b"theirs"})
        return real(api, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(ValueError, match="user/model was changed meanwhile; push again"):
        push(model, "model")
    assert hub.files("user/model")["model.safetensors"] == b"theirs"


@pytest.mark.slow
def test_a_repository_of_something_else(model, folders, hub, tmp_path):
    """It is not overwritten, neither by another kind nor as the base of an adapter, nor is a Space."""
    shutil.copytree(Path(cli.__file__).parent / "tokenizers" / "ptbxl_250hz", tmp_path / "tokenizer")
    push(model, "model")
    push(tmp_path / "tokenizer", "tokenizer")
    hub.repos |= {f"models/user/{name}": {} for name in ("adapter-base", "gguf")}
    hub.commit("models/user/adapter-base", "main", {"config.json": b'{"model_type": "bert"}', "train.py": b"1"})
    hub.commit("models/user/gguf", "main", {"x.gguf": b"1"})
    hub.repos["spaces/user/model"] = {}
    hub.commit("spaces/user/model", "main", {"app.py": b"theirs"})
    before = {repo: dict(revisions) for repo, revisions in hub.repos.items()}
    for folder, name, options, message in (
        (tmp_path / "tokenizer", "model", [], "user/model holds the model of another push; name another .* tokenizer"),
        (model, "tokenizer", [], "holds the tokenizer of"),
        (model, "gguf", [], r"holds the file x\.gguf"),
        (folders / "encoder", "model", [], "holds the model of"),
        (folders / "adapter", "adapter", [], "user/adapter-base holds the bert model of"),
        (folders / "adapter", "adapter", ["--base_repo_id", "user/adapter"], "are both user/adapter; a base model has"),
        (folders / "adapter", "adapter", ["--base_repo_id", "base"], "--base_repo_id is 'base'; expected OWNER/NAME"),
        (folders / "adapter", "model", ["--pr"], "is pushed, not proposed: name a repository of yours"),
        (model, "model", ["--space"], "spaces/user/model is another Space, which --space would overwrite"),
        (model, "model", ["--private"], "user/model is there already, and public"),
    ):
        with pytest.raises(ValueError, match=message):
            push(folder, name, *options)
        assert hub.repos == before, message


def test_base_of_an_adapter(folders, hub, tmp_path, monkeypatch):
    """The base beside it goes before what its configuration names; a name that is nowhere is an error."""
    adapter = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    (adapter / "base_model" / "README.md").write_text("---\ntags: [elm]\n---\n# Base\n\nOf its own card.\n")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "runs/my_elm"  # of another working directory
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    push(adapter, "adapter", "--base_repo_id", "user/my-base")
    pushed = json.loads(hub.files("user/adapter")["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "user/my-base"
    assert "Of its own card." in hub.files("user/my-base")["README.md"].decode()
    assert "base_model: user/my-base" in hub.files("user/adapter")["README.md"].decode()
    shutil.rmtree(adapter / "base_model")
    for name in ("runs/my_elm", None):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(ValueError, match="is neither a folder nor on the Hub; put it in"):
            push(adapter, "other")
    config["base_model_name_or_path"] = "user/my-base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    card = "---\nlibrary_name: peft\ntags: [elm, 'base_model:adapter:/tmp/jane']\n---\n# x\n"
    (adapter / "README.md").write_text(card)
    push(adapter, "other")
    assert "jane" not in hub.files("user/other")["README.md"].decode()


@pytest.mark.slow
def test_what_was_written_is_taken_back(model, folders, hub, monkeypatch, capsys):
    """Where the tag fails after the commit, and the base of an adapter where the adapter fails; both were there before."""
    push(model, "model")
    before = dict(hub.files("user/model"))
    (model / "generation_config.json").write_text("{}")
    (model / "NOTICE").write_text("new")
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_tag", lambda *args, **kwargs: (_ for _ in ()).throw(NETWORK_ERRORS[0]("lost")))
        with pytest.raises(ValueError, match=r"The Hub cannot be reached \(lost\)"):
            push(model, "model")
    assert hub.files("user/model") == before
    assert "user/model is as it was before." in capsys.readouterr().out
    push(model, "model")
    tag = hub.files("user/model")["README.md"].decode().split('"user/model", "')[1].split('"')[0]
    assert hub.files("user/model", tag)["generation_config.json"] == b"{}"

    push(folders / "llava", "adapter-base")
    before = dict(hub.files("user/adapter-base"))
    weights = load_file(folders / "adapter" / "base_model" / "model.safetensors")
    base = shutil.copytree(folders / "adapter", model.parent / "adapter") / "base_model" / "model.safetensors"
    save_file({name: values + 1 for name, values in weights.items()}, base, {"format": "pt"})
    real = HfApi.create_commit

    def fail_at_the_adapter(api, repo_id, *args, **kwargs):
        if repo_id == "user/adapter":
            assert hub.files("user/adapter-base") != before
            raise NETWORK_ERRORS[0]("lost")
        return real(api, repo_id, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", fail_at_the_adapter)
    with pytest.raises(ValueError, match="cannot be reached"):
        push(model.parent / "adapter", "adapter")
    assert hub.files("user/adapter-base") == before
    assert "models/user/adapter" not in hub.repos


def test_pull_request_of_nothing_new(model, hub, capsys):
    push(model, "model")
    push(model, "model", "--pr")
    assert "nothing was sent" in capsys.readouterr().out
    assert "refs/pr/1" not in hub.repos["models/user/model"]


def test_no_network(model, hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ValueError, match=r"The Hub cannot be reached .* Push again"):
        push(model, "model")


def test_own_words_of_the_card_stay(model, hub):
    own = "# x\n\n### Use\n\nmine\n\n## Use\n\nold\n\n## How to cite\n\n@article{jane}\n"
    (model / "README.md").write_text(f"---\nlicense: mit\n---\n{own}")
    push(model, "model")
    text = hub.files("user/model")["README.md"].decode()
    assert "### Use\n\nmine\n\n## Use\n\n```python\n" in text
    assert text.endswith("## How to cite\n\n@article{jane}\n")
    assert "old" not in text


def test_damaged_folders(model, folders, hub, tmp_path):
    for name, content, message in (
        ("README.md", "---\nlicense: [\n---\n# x\n", r"The metadata of .*README\.md are damaged"),
        ("config.json", "[]", r"config\.json holds a list; expected a JSON object"),
        ("evaluation_results.json", "{", r"evaluation_results\.json is not JSON"),
        ("evaluation_results.json", "{}", r"evaluation_results\.json has schema_version None, .* expected 4"),
    ):
        folder = shutil.copytree(model, tmp_path / message.replace("/", "")[:40])
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            push(folder, "model")
    config = json.loads((model / "config.json").read_text())
    del config["auto_map"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no code"):
        push(model, "model")
    assert hub.repos == {}


def _edit(name: str, **changes: Any) -> Any:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def _weights(name: str, change: Any) -> Any:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, {"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("llava", _weights("model.safetensors", lambda t: t.pop("lm_head.weight")), r"its files lack lm_head\.weight"),
        ("llava", _weights("model.safetensors", lambda t: t.update(x=torch.zeros(1))), "its weights hold x, for which"),
        (
            "llava",
            _weights("model.safetensors", lambda t: t.update({name: part.int() for name, part in t.items()})),
            "holds whole numbers as weights",
        ),
        (
            "llava",
            _edit("processor_config.json", num_ecg_tokens=3),
            "the processor's num_ecg_tokens is 3, the model's 4",
        ),
        ("llava", _edit("processor_config.json", feature_extractor="x"), "cannot be loaded"),
        ("llava", _edit("tokenizer_config.json", eos_token=5), "cannot be loaded"),
        ("llava", _edit("tokenizer_config.json", auto_map=5), "its auto_map and custom_pipelines are no JSON objects"),
        (
            "llava",
            _edit("config.json", custom_pipelines=[[1]]),
            "its auto_map and custom_pipelines are no JSON objects",
        ),
        ("llava", lambda folder: (folder / "tokenizer.json").write_text("{}"), "damaged|cannot be loaded"),
        ("llava", lambda folder: (folder / "config.json").write_text("[" * 100_000), "is not JSON"),
        (
            "adapter",
            _weights("adapter_model.safetensors", lambda t: t.popitem()),
            "is not complete: it lacks base_model",
        ),
        ("adapter", _edit("adapter_config.json", peft_type="EVIL"), "cannot be loaded"),
        ("encoder", _weights("model.safetensors", lambda t: t.popitem()), "cannot be loaded: .*lacks?"),
        ("encoder", _edit("config.json", widths="x"), "cannot be loaded"),
    ],
)
def test_what_nobody_could_load_is_not_sent(kind, damage, message, folders, hub, tmp_path):
    """Nor what would be loaded with random weights."""
    folder = shutil.copytree(folders / kind, tmp_path / kind)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        push(folder, "model")
    assert "\n" not in str(caught.value)
    assert hub.repos == {}


def test_what_cannot_be_removed_again_is_said(model, hub, monkeypatch, capsys):
    hub.broken_commits = 100
    monkeypatch.setattr(HfApi, "delete_repo", lambda *args, **kwargs: (_ for _ in ()).throw(NETWORK_ERRORS[0]("lost")))
    with pytest.raises(ValueError, match="The Hub refused"):
        push(model, "model")
    assert "user/model could not be put back as it was: look at it on the Hub." in capsys.readouterr().out


@pytest.mark.slow
def test_killed_while_it_uploads(model, hub):
    """The remote stays as it was, and a push that is repeated ends right."""
    push(model, "model")
    before = dict(hub.files("user/model"))
    weights = load_file(model / "model.safetensors")
    save_file({name: values + 1 for name, values in weights.items()}, model / "model.safetensors", {"format": "pt"})
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    arguments = ["push", str(model), "--repo_id", "user/model", "--license", "mit"]
    process = fork_project("from elm_ecg.training.cli import main\nmain()", *arguments, **environment)
    hub.on_upload = lambda: os.kill(process.pid, signal.SIGKILL)
    assert process.finish().returncode == -signal.SIGKILL
    hub.on_upload = lambda: None
    assert hub.files("user/model") == before
    push(model, "model")
    assert hub.files("user/model")["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_errors_of_the_hub(model, hub, monkeypatch, capsys):
    push(model, "model")
    hub.read_only = {"models/user/model"}
    (model / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"may not write to user/model; .*--pr"):
        push(model, "model")
    capsys.readouterr()
    push(model, "model", "--pr")
    assert f"Pull request {hub.url}/user/model/discussions/1" in capsys.readouterr().out
    assert hub.repos["models/user/model"]["refs/pr/1"]["generation_config.json"] == b"{}"
    with pytest.raises(ValueError, match="There is no repository user/none"):
        push(model, "none", "--pr")
    with pytest.raises(ValueError, match=r"user/model has no revision gone\."):
        push(model, "model", "--pr", "--revision", "gone")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match="does not know this token"):
        push(model, "model")
    monkeypatch.setattr("elm_ecg.training.sharing.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="Nobody is logged in"):
        push(model, "model")


def test_licence(model, hub):
    with pytest.raises(ValueError, match=r"names no licence.*--license"):
        main([str(model), "--repo_id", "user/model"])
    assert hub.repos == {}
    (model / "README.md").write_text("---\nbase_model: owner/llm\n---\n# x\n\n## Use\n\n## Limits\n")
    with pytest.raises(ValueError, match="nor does owner/llm on the Hub"):
        main([str(model), "--repo_id", "user/model"])
    text = b"---\nlicense: llama3.2\nlicense_link: https://a.example/l\n---\n"
    hub.repos["models/owner/llm"] = {}
    hub.commit("models/owner/llm", "main", {"README.md": text})
    main([str(model), "--repo_id", "user/model"])
    data = ModelCard(hub.files("user/model")["README.md"].decode()).data
    assert data.license == "llama3.2"
    assert data.license_link == "https://a.example/l"
    with pytest.raises(ValueError, match="--license other needs --license_link"):
        main([str(model), "--repo_id", "user/model", "--license", "other"])


def test_a_dry_run_says_what_stays_and_that_a_licence_is_missing(model, hub, capsys):
    (model / "training_options.json").write_text("{}")
    dry_run = [str(model), "--repo_id", "user/model", "--dry_run"]
    main(dry_run)
    said = capsys.readouterr().out
    assert "training_options.json" in said.split("Left out: ")[1].split("\n")[0]
    assert "The card names no licence: the push needs --license.\n" in said
    main([*dry_run, "--license", "mit"])
    assert "licence" not in capsys.readouterr().out
    (model / "README.md").write_text("---\nbase_model: owner/llm\n---\n# x\n\n## Use\n\n## Limits\n")
    main(dry_run)
    assert "licence: that of owner/llm on the Hub is taken; if it names none, the push needs" in capsys.readouterr().out
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"x", "is a pickle"),
        ("extra/weights.pt", b"x", "is a pickle"),
        ("scan.dcm", bytes(128) + b"DICM", r"looks like data of patients \(DICOM\)"),
        ("export", b"<?xml version='1.0'?><AnnotatedECG/>", r"looks like data of patients \(XML"),
        ("ecg", bytes(16) + b"SCPECG" + bytes(9), r"looks like data of patients \(SCP-ECG\)"),
        ("patients.csv", b"name", "looks like data of patients"),
        ("evaluation_results.json", b'{"a": [{"patient_id": 3}]}', "holds patient_id"),
        (
            "evaluation_results.json",
            b'{"examples": ["as on 12-MAR-2014"]}',
            "has '12-MAR-2014', which may be of a patient",
        ),
        ("report.html", b"<td>Compared with 2014-03-12: new</td></html>", "has '2014-03-12'"),
        ("report.html", b"<td>seen on March 12, 2014</td></html>", "has 'March 12, 2014'"),
        ("report.html", b"<td>3.12.2014 sinus rhythm</td></html>", "has '3.12.2014'"),
        ("report.html", b"<td>DOE^JANE</td></html>", r"has 'DOE\^JANE'"),
        ("README.md", b"# x\n\nPatient name: Jane Doe\n", "has 'Patient name: Jane Doe'"),
        ("README.md", b"# x\n\nMRN: 12345\n", "has 'MRN: 12345'"),
        ("README.md", b"# x\n\nhf_" + b"a" * 34, "has a token or key, hf_aaa"),
        ("NOTICE", b"Based on /home/jane/x", "a folder of this machine"),
        ("generation_config.json", b'{"a": "hf_' + b"a" * 34 + b'"}', "has a token or key"),
        ("chat_template.jinja", b"Patient name: Jane Doe", "has 'Patient name: Jane Doe'"),
        ("special_tokens_map.json", b'{"pad_token": "DOE^JANE"}', r"has 'DOE\^JANE'"),
    ],
)
def test_refuses_a_file(name, content, message, model, hub):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(content)
    if name == "report.html":
        save_results(model, model)
    with pytest.raises(ValueError, match=message):
        push(model, "model")
    assert hub.repos == {}


def test_refuses_links_and_code_from_elsewhere(model, hub, tmp_path):
    """Neither a vocabulary, a configuration, a card, a licence nor code is fetched from outside the folder."""
    (tmp_path / "secret.py").write_text("password = 1")
    for name in ("merges.txt", "generation_config.json", "README.md", "LICENSE", "pipeline_elm.py"):
        before = (model / name).read_bytes() if (model / name).exists() else None
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("/etc/hostname" if name != "generation_config.json" else tmp_path / "outside.json")
        (tmp_path / "outside.json").write_text("{}")
        with pytest.raises(ValueError, match=rf"{name} is a link to /.*, outside of the folder: nothing was shared"):
            push(model, "model")
        (model / name).unlink()
        if before is not None:
            (model / name).write_bytes(before)
    config = json.loads((model / "config.json").read_text())
    for module in (f"{tmp_path}/secret", "../secret", "owner/name--../secret"):
        config["auto_map"]["AutoModel"] = f"{module}.Model"
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json names the code .*secret'; expected a module beside it"):
            push(model, "model")
    config["auto_map"]["AutoModel"] = "pipeline_elm.Model"
    (model / "config.json").write_text(json.dumps(config))
    with (model / "pipeline_elm.py").open("a") as file:
        file.write(f"\nfrom .{tmp_path}/secret import password\n")  # transformers follows it as a path
    with pytest.raises(ValueError, match=r"\.py names the code '.*secret'; expected"):
        push(model, "model")
    assert hub.repos == {}


def test_refuses_weights_that_diverged_or_name_somebody(model, hub):
    weights = load_file(model / "model.safetensors")
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    for value in (float("nan"), float("inf")):
        changed = weights | {name: weights[name].clone()}
        changed[name].view(-1)[-1] = value
        save_file(changed, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{name} in .*model\.safetensors has NaN or infinite values"):
            push(model, "model")
    save_file(weights, model / "model.safetensors", {"format": "pt", "note": "DOE^JANE"})
    with pytest.raises(ValueError, match=r"model\.safetensors has 'DOE\^JANE'"):
        push(model, "model")
    assert hub.repos == {}


def test_files_of_another_kind_and_own_code_are_named_and_stay(folders, hub, tmp_path, capsys):
    encoder = shutil.copytree(folders / "encoder", tmp_path / "encoder")
    names = ["tokenizer.json", "chat_template.jinja", "adapter_config_old.json", "training_options.json", "mine.py"]
    for name in names:
        (encoder / name).write_text("{}")
    push(encoder, "encoder")
    printed = capsys.readouterr().out
    files = hub.files("user/encoder")
    for name in names:
        assert name not in files
        assert name in printed.split("Left out: ")[1].split("\n")[0]


def test_paths_in_the_configuration_of_an_adapter(folders, hub, tmp_path):
    adapter = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": {"of": "/home/jane/secret/eva"}}))
    push(adapter, "adapter")
    assert b"secret" not in hub.files("user/adapter")["adapter_config.json"]


def test_text_of_nobody_is_sent(model, hub):
    """Dates of a card and numbers that look like none are no one's."""
    (model / "README.md").write_text(
        "# x\n\nTrained on 2026-11-20 with torch 2.15.0; the model's name: x. V1^2 = I - II\n"
    )
    (model / "report.html").write_text("<td>QT 392 ms, 1.2.3, 12/100/2000; P^2, exact match 12.5 2014</td></html>")
    save_results(model, model)
    push(model, "model")
    assert b"2026-11-20" in hub.files("user/model")["README.md"]


def test_refuses_what_is_no_model(model, tmp_path, hub):
    for folder, message in ((tmp_path / "none", "is no folder"), (tmp_path, "has no config.json")):
        with pytest.raises(ValueError, match=message):
            push(folder, "model")
    (model / "pipeline_elm.py").unlink()
    with pytest.raises(ValueError, match=r"lacks pipeline_elm\.py"):
        push(model, "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights in safetensors"):
        push(model, "model")
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        main([str(model), "--repo_id", "model"])
    config = {"model_type": "bert"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is of a bert model"):
        kind_of(model)
    assert hub.repos == {}


def test_dataset(hub, tmp_path, capsys):
    """What is no longer there goes, other people's files stay; it can be proposed, as a model can."""

    def write(name: str, answer: str = "yes") -> None:
        pq.write_table(pa.table({"attribute": [answer]}), tmp_path / "data" / f"{name}.parquet")

    (tmp_path / "data").mkdir()
    write("train")
    write("test-1")
    (tmp_path / "README.md").write_text("---\nlicense: unknown\n---\n# ecgs\n\n## Use\n\nlater\n")
    with pytest.raises(ValueError, match=r"no licence\. A dataset is shared under that of what it was made of"):
        main([str(tmp_path), "--repo_id", "user/ecgs"])
    push(tmp_path, "ecgs")
    repo = hub.repos["datasets/user/ecgs"]
    assert repo["main"].keys() == {"README.md", "data/train.parquet", "data/test-1.parquet"}
    assert 'load_dataset("user/ecgs", "train"' in repo["main"]["README.md"].decode()
    (tmp_path / "data" / "train.parquet").unlink()
    others = {"LICENSE": b"mit", "data/raw/x.parquet": b"theirs"}
    hub.commit("datasets/user/ecgs", "main", repo["main"] | others)
    capsys.readouterr()
    push(tmp_path, "ecgs")
    assert "Removed, as it is no longer in the folder: data/train.parquet\n" in capsys.readouterr().out
    assert repo["main"].keys() == {"README.md", "data/test-1.parquet", *others}
    assert 'load_dataset("user/ecgs", "test"' in repo["main"]["README.md"].decode()
    hub.read_only = {"datasets/user/ecgs"}
    write("test-1", "no")
    before = repo["main"]["data/test-1.parquet"]
    push(tmp_path, "ecgs", "--pr")
    assert repo["refs/pr/1"]["data/test-1.parquet"] != before
    assert repo["main"]["data/test-1.parquet"] == before
    for option, message in (
        ("--space", r"holds a dataset\."),
        ("--base_repo_id=user/base", "for the base of an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            push(tmp_path, "ecgs", option)


def test_tokenizer(hub, tmp_path):
    shutil.copytree(Path(cli.__file__).parent / "tokenizers" / "ptbxl_250hz", tmp_path / "tokenizer")
    push(tmp_path / "tokenizer", "tokenizer")
    names = {"README.md", "ecg_byte.json", "tokenization_ecg_byte.py", "sample_ecg.npz"}
    files = hub.files("user/tokenizer")
    assert files.keys() == names
    assert files["README.md"].decode() in hub.cards  # the Hub has validated it
    with pytest.raises(ValueError, match="--space is a page that asks a model"):
        push(tmp_path / "tokenizer", "tokenizer", "--space")


def test_space(model, hub):
    push(model, "model", "--space")
    files = hub.files("user/model", repo_type="space")
    assert {"README.md", "app.py", "space.json", "requirements.txt"} <= files.keys()
    space = json.loads(files["space.json"])
    assert space["model"] == "user/model"
    assert space["revision"] in commits(hub, "model")


@pytest.mark.parametrize("rate", [100, 250, 500])
def test_sample_is_read_as_any_record(rate, tmp_path):
    """Of a normal sinus rhythm, without faults."""
    from elm_ecg.training.sharing.push import sample_ecg

    assert sample_ecg(rate, 10 * rate) == sample_ecg(rate, 10 * rate)
    (tmp_path / "sample.npz").write_bytes(sample_ecg(rate, 10 * rate))
    record = read_ecg(tmp_path / "sample.npz")
    assert record.array.shape == (12, 10 * rate)
    assert record.sampling_rate == rate
    assert limb_lead_error(record) < 0.002
    assert lead_quality(record) == {}
