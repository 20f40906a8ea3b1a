import io
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import load
from elm_ecg.training.build import new_elm
from elm_ecg.training.load import load_elm
from elm_ecg.training.model_files import check_finite, non_finite
from helpers import fork_project, save_tiny_llm, tiny_elm, tiny_elm_config, tiny_image_processor_elm, tiny_processor


def save_adapter(base, folder, processor, seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(
        ELMForConditionalGeneration.from_pretrained(base),
        LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["model.connector"]),
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of an ELM and of an adapter of it."""
    folder = tmp_path_factory.mktemp("saved")
    processor = tiny_processor()
    tiny_elm(processor, ecg_part="merl").save_pretrained(folder / "elm")
    processor.save_pretrained(folder / "elm")
    save_adapter(folder / "elm", folder / "adapter", processor)
    return folder


@pytest.fixture
def elm(saved, tmp_path):
    return shutil.copytree(saved / "elm", tmp_path / "elm")


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved / "adapter", tmp_path / "adapter")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


def assert_refused(folder, message=""):
    """In one line that names the folder."""
    with pytest.raises(ValueError, match=message) as caught:
        load_elm(str(folder))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    assert str(folder) in text


def test_whole_ones_are_loaded(saved, caplog):
    for name in ("elm", "adapter"):
        model, processor = load_elm(str(saved / name))
        assert processor.num_ecg_tokens == model.config.num_ecg_tokens == 4
    assert caplog.messages == []


def bad_json(name, content):
    return lambda folder: (folder / name).write_text(content)


NORM = "model.encoder.stem.norm.weight"
DAMAGES = {
    "list as config": (bad_json("config.json", "[1]"), r"config\.json is damaged: expected a JSON object, got list"),
    "no JSON": (bad_json("config.json", "{"), r"config\.json is damaged: no JSON"),
    "empty tokenizer": (bad_json("tokenizer.json", "{}"), r"tokenizer\.json is damaged: no tokenizer"),
    "list as processor": (bad_json("processor_config.json", "[]"), r"processor_config\.json is damaged: expected a JSON"),
    "null as generation config": (bad_json("generation_config.json", "null"), r"generation_config\.json is damaged"),
    "deep JSON": (bad_json("config.json", "[" * 100_000), r"config\.json is damaged: no JSON"),
    "empty template": (bad_json("chat_template.jinja", ""), r"no chat template \(chat_template\.jinja\)"),
    "template without ECG": (bad_json("chat_template.jinja", "{{ messages[0]['role'] }}"), "does not write the question and one"),
    "template that fails": (bad_json("chat_template.jinja", "{% for %}"), r"chat template \(chat_template\.jinja\) fails"),
    "no text": (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), r"chat_template\.jinja is damaged: no text"),
    "of a language model": (
        lambda folder: edit_json(folder / "config.json", model_type="llama"),
        "config.json is of a 'llama' model, not of an ELM; `elm sft --llm",
    ),
    "of a pretraining model": (
        lambda folder: edit_json(folder / "config.json", model_type="ecg_pretraining"),
        "is of a 'ecg_pretraining' model, not of an ELM; `elm sft --encoder .* around an ECG encoder",
    ),
    "without a model type": (lambda folder: edit_json(folder / "config.json", model_type=None), "is of a None model"),
    "unknown architecture": (lambda folder: edit_json(folder / "config.json", architecture="lava"), "architecture is 'lava'"),
    "other sizes": (
        lambda folder: edit_json(folder / "config.json", text_config=tiny_elm_config(None, "qwen2_5").text_config.to_dict()),
        "cannot be loaded",
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder / "model.safetensors", put(NORM, lambda value: value[:3].clone())),
        rf"{NORM} is \[3\] in model\.safetensors, and \[8\] by the config",
    ),
    "default sizes, of 7 billion weights": (
        lambda folder: edit_json(folder / "config.json", text_config={"model_type": "llama"}),
        r"is \[.*\] in model\.safetensors, and \[.*4096.*\] by the config",
    ),
    "millions of layers": (
        lambda folder: edit_part(folder / "config.json", "text_config", num_hidden_layers=10**7),
        r"config\.json says num_hidden_layers 10000000, and its files hold 61 weights",
    ),
    "millions of blocks": (
        lambda folder: edit_part(folder / "config.json", "encoder_config", depths=[1, 10**7]),
        r"config\.json says depths 10000000",
    ),
    "missing": (
        lambda folder: edit_weights(folder / "model.safetensors", lambda tensors: tensors.pop(NORM)),
        f"is not complete: its files lack {NORM}",
    ),
    "unknown": (
        lambda folder: edit_weights(folder / "model.safetensors", lambda tensors: tensors.update(x=torch.zeros(1))),
        "its weights hold x, for which the model of config.json has no place",
    ),
    "whole numbers": (
        lambda folder: edit_weights(folder / "model.safetensors", put(NORM, lambda value: value.int())),
        rf"model\.safetensors holds whole numbers as weights: {NORM} \(I32\)",
    ),
    "NaN": (
        lambda folder: edit_weights(folder / "model.safetensors", put(NORM, lambda value: value * torch.nan)),
        f"has weights that are NaN or infinite: {NORM}",
    ),
    "infinity": (
        lambda folder: edit_weights(folder / "model.safetensors", put("lm_head.weight", lambda value: value / 0)),
        r"NaN or infinite: lm_head\.weight",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "a pickle": (
        lambda folder: torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        or (folder / "model.safetensors").unlink(),
        "cannot be loaded: .*safetensors",
    ),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "cannot be loaded"),
    "index without files": (
        lambda folder: (folder / "model.safetensors").unlink()
        or bad_json("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')(folder),
        r"names files that are not there: b\.safetensors",
    ),
    "longer records": (
        lambda folder: edit_processor(folder, num_samples=1000),
        r"the processor's num_samples is 1000, the model's 500 \(processor_config",
    ),
    "fewer leads": (lambda folder: edit_processor(folder, lead_names=["I", "II"]), "number of leads is 2, the model's 12"),
    "fewer tokens of an ECG": (
        lambda folder: edit_json(folder / "processor_config.json", num_ecg_tokens=3),
        "the processor's num_ecg_tokens is 3, the model's 4",
    ),
}  # fmt: skip


def edit_part(path, name, **changes):
    edit_json(path, **{name: json.loads(path.read_text())[name] | changes})


def edit_processor(folder, **changes):
    edit_part(folder / "processor_config.json", "feature_extractor", **changes)


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_elm(elm, damage, message):
    damage(elm)
    assert_refused(elm, message)


def add_code(folder, name="tokenizer_config.json"):
    """A tokenizer of the folder's own code, which leaves a file; returns where."""
    edit_json(folder / name, auto_map={"AutoTokenizer": [None, "evil.Own"]}, tokenizer_class="OwnTokenizer")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass\n")
    return folder / "ran"


def test_code_beside_a_model_is_not_run(elm, tmp_path, monkeypatch):
    """Not even where the first line of a script, which is a question, says yes to transformers' question about it."""
    llm = save_tiny_llm(tmp_path / "llm")
    for folder, read in ((elm, load_elm), (llm, lambda name: new_elm(name, architecture="fuyu", num_samples=500))):
        ran = add_code(folder)
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        with pytest.raises(ValueError, match="code"):
            read(str(folder))
        assert not ran.exists()
    assert_refused(elm, r"it comes with code of its own \(auto_map\), which `elm` does not run")


def test_another_tokenizer(elm):
    processor = tiny_processor()
    processor.tokenizer.add_tokens([f"token {number}" for number in range(100)])
    processor.save_pretrained(elm)
    assert_refused(elm, r"the tokenizer has 36\d tokens, the model 300")
    tiny_image_processor_elm("vit").save_pretrained(elm)
    assert_refused(elm, "the processor's representation is rgb, the model's signal")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "processor_config.json"])
def test_truncated_and_flipped_files(elm, name):
    """Each is an error in one line, unless the model is what it was."""
    path = elm / name
    whole = path.read_bytes()
    damaged = [b"", whole[: len(whole) // 2]]
    head = whole.index(b"}", 8) if name == "model.safetensors" else len(whole)
    damaged += [whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :] for place in range(0, head, head // 3)]
    for content in damaged:
        path.write_bytes(content)
        try:
            load_elm(str(elm))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
    path.write_bytes(damaged[1])
    assert_refused(elm, f"{name} is damaged")


class TestAdapters:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (bad_json("adapter_config.json", "[]"), r"adapter_config\.json is damaged"),
            (bad_json("adapter_config.json", "{}"), "cannot be loaded"),
            (
                lambda folder: edit_json(folder / "adapter_config.json", base_model_name_or_path=None),
                r"adapter_config\.json does not name its base model",
            ),
            (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"it has no adapter_model\.safetensors"),
            (
                lambda folder: edit_weights(folder / "adapter_model.safetensors", lambda tensors: tensors.popitem()),
                r"adapter_model\.safetensors is not complete: it lacks base_model",
            ),
            (
                lambda folder: edit_weights(
                    folder / "adapter_model.safetensors", lambda t: t.pop("base_model.model.model.connector.linear_1.bias")
                ),
                r"adapter_model\.safetensors is not complete: it lacks base_model\.model\.model\.connector\.linear_1\.bias",
            ),
            (
                lambda folder: edit_weights(folder / "adapter_model.safetensors", lambda t: t.update(x=torch.zeros(1))),
                "holds x, for which its base .* has no place",
            ),
            (
                lambda folder: edit_weights(folder / "adapter_model.safetensors", lambda t: t.update({n: v / 0 for n, v in t.items()})),
                "NaN or infinite",
            ),
            (
                lambda folder: edit_weights(folder / "adapter_model.safetensors", lambda t: t.update({n: v.int() for n, v in t.items()})),
                "holds whole numbers as weights",
            ),
        ],
    )  # fmt: skip
    def test_damaged(self, adapter, damage, message):
        damage(adapter)
        assert_refused(adapter, message)

    def test_truncated(self, adapter):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        assert_refused(adapter, r"adapter_model\.safetensors is damaged or incomplete")

    def test_revision_of_the_base(self, adapter, monkeypatch):
        """`elm push` writes it, and the digest of the adapter counts it."""
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="owner/base", revision="v2")
        asked = []

        def find(name, filenames, revision="main", label=""):
            asked.append((name, revision))
            raise ValueError("not asked further")

        model_folder = load.model_folder
        monkeypatch.setattr(
            load, "model_folder", lambda *args: model_folder(*args) if args[0] == str(adapter) else find(*args)
        )
        with pytest.raises(ValueError, match="not asked further"):
            load_elm(str(adapter))
        assert asked == [("owner/base", "v2")]

    def test_base_that_is_not_there(self, adapter, tmp_path):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match=r"The adapter's base .*nowhere is no folder here"):
            load_elm(str(adapter))

    def test_base_of_another_shape(self, adapter, tmp_path):
        other = ELMForConditionalGeneration(tiny_elm_config("mtae", "qwen2_5"))
        other.save_pretrained(tmp_path / "other")
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
        assert_refused(adapter, "cannot be loaded")

    def test_damaged_base(self, adapter, elm):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(elm))
        edit_weights(elm / "model.safetensors", put(NORM, lambda value: value * torch.nan))
        with pytest.raises(
            ValueError, match=f"The adapter's base .*elm cannot be loaded: it has weights that are NaN.*{NORM}"
        ):
            load_elm(str(adapter))


DEAD_HUB = """
import sys, time
from elm_ecg.training.build import new_elm
from elm_ecg.training.load import load_elm
from elm_ecg.training.cli import main
start = time.time()
for name in ("user/elm", "user/adapter"):
    print(load_elm(name)[1].num_ecg_tokens)
print(new_elm("user/llm", architecture="fuyu", num_samples=500)[0].config.architecture)
sys.stderr = sys.stdout
print(main(["chat", "user/other"]))
print(time.time() - start)
"""


def test_cached_models_and_a_hub_that_does_not_answer(saved, tmp_path):
    """They are loaded at once, in place of trying each file for half a minute; of one that is not there one line says so."""
    folders = {"elm": saved / "elm", "adapter": tmp_path / "adapter", "llm": save_tiny_llm(tmp_path / "llm")}
    shutil.copytree(saved / "adapter", folders["adapter"])
    edit_json(folders["adapter"] / "adapter_config.json", base_model_name_or_path="user/elm")
    for name, folder in folders.items():
        cache = tmp_path / "home" / "hub" / f"models--user--{name}"
        shutil.copytree(folder, cache / "snapshots" / ("a" * 40))
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("a" * 40)
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    process = fork_project(DEAD_HUB, **dead).finish()
    assert process.returncode == 0, process.stderr
    *values, message, status, seconds = process.stdout.splitlines()
    assert values[-3:] == ["4", "4", "fuyu"]
    assert message.startswith("elm chat: The model user/other is no folder here and not in the Hub's cache")
    assert status == "1"
    assert float(seconds) < 20


def test_non_finite():
    fine = {
        "float": torch.full((3,), 3e38),  # whose sum overflows
        "half": torch.full((9,), 6e4, dtype=torch.float16),
        "whole": torch.ones(2, dtype=torch.int64),
        "meta": torch.empty(2, device="meta"),
    }
    assert non_finite(fine) == []
    check_finite(fine, "it")
    bad = {"nan": torch.tensor([1, torch.nan]), "inf": torch.tensor([torch.inf, -torch.inf], dtype=torch.bfloat16)}
    assert non_finite(fine | bad) == ["nan", "inf"]
    with pytest.raises(ValueError, match=r"M has weights that are NaN or infinite: nan, inf\. Its training has failed"):
        check_finite(bad, "M")
