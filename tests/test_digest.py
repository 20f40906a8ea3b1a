import json
import shutil
from pathlib import Path

import pytest
import torch

from elm_ecg.training.digest import base_of_adapter, digest_of_folder, digest_of_model, files_of_model, folder_of
from elm_ecg.training.files import write_text
from elm_ecg.training.load import load_elm
from helpers import tiny_elm, tiny_processor

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, processor = tmp_path_factory.mktemp("digest") / "elm", tiny_processor()
    tiny_elm(processor).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def copy(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


def test_a_copy_is_the_same_model_whatever_else_lies_there(folder, tmp_path):
    """Neither where it is counts, nor what training and evaluation put beside."""
    twin = copy(folder, tmp_path / "twin")
    for name in ("README.md", "evaluation_results.json", "trainer_state.json", "report.html", "evaluation/a/b.json"):
        (twin / name).parent.mkdir(parents=True, exist_ok=True)
        (twin / name).write_text("{}")
    assert digest_of_folder(twin) == digest_of_folder(folder)
    assert digest_of_folder(folder).startswith("sha256:")


def test_every_file_that_loading_reads_counts(folder, tmp_path):
    """One byte more in any of them; each of these was once found to change answers."""
    twin, before = copy(folder, tmp_path / "twin"), digest_of_folder(folder)
    names = [path.name for path in files_of_model(twin)]
    needed = {"config.json", "model.safetensors", "processor_config.json", "chat_template.jinja", "tokenizer.json"}
    assert needed | {"generation_config.json", "tokenizer_config.json", "modeling_elm.py"} <= set(names)
    for name in names:
        content = (twin / name).read_bytes()
        (twin / name).write_bytes(content + b" ")
        assert digest_of_folder(twin) != before, name
        (twin / name).write_bytes(content)
    assert digest_of_folder(twin) == before
    (twin / "additional_chat_templates").mkdir()
    (twin / "additional_chat_templates" / "tools.jinja").write_text("{{ 1 }}")
    assert digest_of_folder(twin) != before


def test_an_adapter_counts_with_its_base(folder, tmp_path):
    """The base's content, not its place; of one on the Hub its commit."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = copy(folder, adapter / "base_model")

    def digest(**config) -> str:
        write_text(adapter / "adapter_config.json", json.dumps({"r": 8, **config}))
        return digest_of_folder(adapter)

    before = digest(base_model_name_or_path=str(base))
    assert digest(base_model_name_or_path="/gone/elsewhere/base_model") == before
    assert digest(base_model_name_or_path=str(copy(folder, tmp_path / "moved"))) == before
    assert digest(base_model_name_or_path=str(base), r=4) != before
    (base / "chat_template.jinja").write_text("{{ 1 }}")
    assert digest(base_model_name_or_path=str(base)) != before
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        digest()
    with pytest.raises(ValueError, match="names its own folder"):
        digest(base_model_name_or_path=str(adapter))


def test_a_copied_adapter_has_the_base_that_was_copied_with_it(tmp_path):
    """In the folder that it was copied from another may have been trained since."""
    for name in ("adapter", "kept"):
        (tmp_path / name / "base_model").mkdir(parents=True)
        named = json.dumps({"base_model_name_or_path": str(tmp_path / "adapter" / "base_model")})
        write_text(tmp_path / name / "adapter_config.json", named)
        (tmp_path / name / "checkpoint-2").mkdir()
        write_text(tmp_path / name / "checkpoint-2" / "adapter_config.json", named)
        for folder in (tmp_path / name, tmp_path / name / "checkpoint-2"):
            assert base_of_adapter(folder) == str(tmp_path / name / "base_model")


def test_a_base_on_the_hub_counts_by_its_commit(tmp_path, monkeypatch):
    write_text(
        tmp_path / "adapter_config.json", json.dumps({"base_model_name_or_path": "owner/base", "revision": COMMIT})
    )
    places = [tmp_path / "snapshots" / commit / "config.json" for commit in (COMMIT, COMMIT[::-1])]
    digests = []
    for place in places:
        found = str(place)
        monkeypatch.setattr("elm_ecg.training.digest.try_to_load_from_cache", lambda *args, _at=found, **kwargs: _at)
        digests.append(digest_of_folder(tmp_path))
    assert digests[0] != digests[1]
    assert folder_of("owner/base").name == COMMIT[::-1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no config\.json and no adapter_config\.json"),
        ({"adapter_config.json": "{'"}, "is not JSON"),
        ({"adapter_config.json": "[]"}, "holds a list"),
    ],
)
def test_no_model(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        digest_of_folder(tmp_path)
    with pytest.raises(ValueError, match="is no folder here, and not in the Hub's cache"):
        folder_of(f"owner/{tmp_path.name}")


def test_a_model_in_memory(folder):
    """Its weights, whatever their type, its generation config and its processor count."""
    model, processor = load_elm(str(folder))
    before = digest_of_model(model, processor)
    assert before.startswith("memory:sha256:")
    assert digest_of_model(*load_elm(str(folder))) == before
    assert digest_of_model(model.to(torch.bfloat16), processor) != before
    model.float()
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[0, 0] += 1
    changed = digest_of_model(model, processor)
    assert changed != before
    model.generation_config.temperature = 0.5
    assert digest_of_model(model, processor) != changed
    changed = digest_of_model(model, processor)
    processor.chat_template += " "
    assert digest_of_model(model, processor) != changed
