"""Encoders and connectors of somebody's own: built, saved with their code, loaded by strangers, trained and refused."""

import json
import os
import re
import shutil
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, BertModel, PreTrainedModel

from elm_ecg import new_elm
from elm_ecg.configuration_elm import ELMConfig, is_unread
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.modeling_parts import load_encoder_part
from elm_ecg.training import pretrain, sft
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.load import load_elm
from elm_ecg.training.sharing.push import check_loads, gather, kind_of
from forks import Fork
from helpers import (
    ROOT,
    TINY_ENCODERS,
    TINY_VISION,
    losses,
    run_isolated,
    save_tiny_data,
    save_tiny_llm,
    tiny_sft,
    tiny_tokenizer,
)

PAGE = (ROOT / "docs" / "how_to" / "own_encoder_and_connector.md").read_text(encoding="utf-8")
SMALL = {"num_samples": 500, "num_ecg_tokens": 4}
REFUSED = r"code of its own, my_parts\.MyEncoder, which is not run unasked.*--trust_remote_code"


def blocks() -> dict[str, str]:
    """File name -> content of the page's blocks that are files."""
    return dict(re.findall(r"```python\n(?=# (\w+\.py)\n)(.*?)```", PAGE, flags=re.DOTALL))


def load_module(path: Path) -> ModuleType:
    """The module of a file, under its own name, as `import` finds it where the file lies."""
    spec = util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a language model, data, and the files of the page."""
    folder = tmp_path_factory.mktemp("own")
    save_tiny_llm(folder / "llm")
    save_tiny_data(folder / "data", without_ecg=4, train=8, validation=4)
    for name, text in blocks().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def parts(work):
    """The module of the page."""
    yield load_module(work / "my_parts.py")
    del sys.modules["my_parts"]


@pytest.fixture(scope="module")
def encoder_folder(work, parts) -> Path:
    torch.manual_seed(0)
    model, _ = new_elm(str(work / "llm"), encoder=parts.MyEncoder, encoder_config={"hidden_size": 16}, **SMALL)
    model.model.encoder.save_pretrained(work / "encoder")
    return work / "encoder"


@pytest.fixture(scope="module")
def elm_folder(work, parts) -> Path:
    """An ELM of both, with its processor."""
    fields = {"encoder_config": {"hidden_size": 16}, "connector_config": {"dropout": 0.5}}
    model, processor = new_elm(
        str(work / "llm"), encoder=parts.MyEncoder, connector=parts.MyConnector, **fields, **SMALL
    )
    for part in (model, processor):
        part.save_pretrained(work / "elm")
    return work / "elm"


def records() -> torch.Tensor:
    return torch.randn(2, 12, 500, generator=torch.Generator().manual_seed(0))


ANSWER = """
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained("elm", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("elm", trust_remote_code=True)
ecg = {"array": np.sin(np.arange(6000.0).reshape(12, 500)), "sampling_rate": 250}
question = [{"role": "user", "content": [{"type": "ecg", "ecg": ecg}, {"type": "text", "text": "Rhythm?"}]}]
inputs = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(answer[0, -4:].tolist(), type(model.model.encoder).__name__, type(model.model.connector).__name__)
"""


def test_the_example_of_the_page_is_loaded_by_a_stranger(work, tmp_path):
    assert sum(len(text.splitlines()) for text in blocks().values()) <= 60
    for name, text in blocks().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "stranger").mkdir()
    arguments, environment = (
        (str(work / "llm"), str(tmp_path / "stranger" / "elm")),
        os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    build = Fork(blocks()["build.py"], *arguments, cwd=tmp_path, environment=environment, project=True).finish()
    assert build.returncode == 0, build.stderr
    answer = run_isolated(ANSWER, tmp_path / "stranger")
    assert re.fullmatch(r"\[\d+, \d+, \d+, \d+\] MyEncoder MyConnector\n", answer)
    here, _ = load_elm(str(tmp_path / "stranger" / "elm"), trust_remote_code=True)
    assert here.config.num_samples == here.config.encoder_config.num_samples == 500


class TestSavedWithItsCode:
    def test_it_is_loaded_as_it_was(self, elm_folder, parts):
        model, _ = load_elm(str(elm_folder), trust_remote_code=True)
        assert type(model.model.encoder).__module__.startswith("transformers_modules.")
        assert model.config.connector_config == {"dropout": 0.5}
        assert model.model.connector.dropout.p == 0.5
        again = AutoModelForCausalLM.from_pretrained(elm_folder, trust_remote_code=True)
        for name, weight in again.state_dict().items():
            torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)
        torch.testing.assert_close(
            again.eval().get_ecg_features(ecg_values=records()), model.eval().get_ecg_features(ecg_values=records())
        )

    def test_no_code_runs_unasked(self, elm_folder, encoder_folder, work):
        with pytest.raises(ValueError, match=REFUSED):
            load_elm(str(elm_folder))
        with pytest.raises(ValueError, match=REFUSED):
            ELMForConditionalGeneration.from_pretrained(elm_folder)
        with pytest.raises(ValueError, match=REFUSED):
            new_elm(str(work / "llm"), encoder=str(encoder_folder), **SMALL)
        with pytest.raises(ValueError, match=REFUSED):
            check_loads(elm_folder, "model")
        assert is_unread(ELMConfig.from_pretrained(elm_folder).encoder_config)

    def test_a_configuration_that_was_not_read_is_saved_as_it_was(self, elm_folder, tmp_path):
        ELMConfig.from_pretrained(elm_folder).save_pretrained(tmp_path)
        first, second = (json.loads((folder / "config.json").read_text()) for folder in (elm_folder, tmp_path))
        assert first["encoder_config"] == second["encoder_config"]
        with pytest.raises(ValueError, match="The code of the my_encoder encoder is not loaded"):
            ELMForConditionalGeneration(ELMConfig.from_pretrained(elm_folder))

    def test_weights_that_init_weights_overwrites_stay(self, work, tmp_path):
        """As of others' encoders alone, though `_init_weights` does not look whether they are loaded."""
        text = blocks()["my_parts.py"].replace(
            "    def forward(self, ecg_values",
            "    def _init_weights(self, module):\n        for weight in module.parameters(recurse=False):\n"
            "            weight.data.fill_(0.5)\n\n    def forward(self, ecg_values",
        )
        (tmp_path / "careless.py").write_text(text, encoding="utf-8")
        module = load_module(tmp_path / "careless.py")
        model, processor = new_elm(str(work / "llm"), encoder=module.MyEncoder, **SMALL)
        assert (model.model.encoder.patches.weight == 0.5).all()
        model.model.encoder.patches.weight.data.fill_(2.0)
        for part in (model, processor):
            part.save_pretrained(tmp_path / "elm")
        loaded, _ = load_elm(str(tmp_path / "elm"), trust_remote_code=True)
        assert (loaded.model.encoder.patches.weight == 2).all()

    def test_its_encoder_alone(self, elm_folder, work, tmp_path):
        of_elm = load_encoder_part(elm_folder, trust_remote_code=True).eval()
        model, _ = load_elm(str(elm_folder), trust_remote_code=True)
        with torch.no_grad():
            expected = model.eval().model.encoder(records()).last_hidden_state
            torch.testing.assert_close(of_elm(records()).last_hidden_state, expected)
        taken, _ = new_elm(str(work / "llm"), encoder=str(elm_folder), trust_remote_code=True, **SMALL)
        torch.testing.assert_close(taken.model.encoder.patches.weight, of_elm.patches.weight)
        of_elm.save_pretrained(tmp_path / "encoder")
        alone = AutoModel.from_pretrained(tmp_path / "encoder", trust_remote_code=True)
        torch.testing.assert_close(alone.patches.weight, of_elm.patches.weight)

    def test_a_vision_backbone_of_an_elm(self, work, tmp_path):
        """With the image processor that prepares its pictures."""
        options = {"representation": "rgb", "num_ecg_tokens": 4, "num_samples": 500}
        changes = {"encoder_config": TINY_VISION["vit"], "image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
        model, processor = new_elm(str(work / "llm"), encoder="vit", **changes, **options)
        for part in (model, processor):
            part.save_pretrained(tmp_path / "elm")
        taken, its_processor = new_elm(str(work / "llm"), seed=1, encoder=str(tmp_path / "elm"), **options)
        for name, weight in model.model.encoder.state_dict().items():
            torch.testing.assert_close(taken.model.encoder.state_dict()[name], weight)
        assert its_processor.image_processor.to_dict() == processor.image_processor.to_dict()

    def test_the_encoder_that_pretraining_leaves(self, encoder_folder, work, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "ecg_pretraining"}))
        with pytest.raises(ValueError, match="a pretraining model, whose encoder is missing"):
            new_elm(str(work / "llm"), encoder=str(tmp_path), **SMALL)
        shutil.copytree(encoder_folder, tmp_path / "encoder")
        taken, _ = new_elm(str(work / "llm"), encoder=str(tmp_path), trust_remote_code=True, **SMALL)
        of_folder = load_encoder_part(encoder_folder, trust_remote_code=True)
        torch.testing.assert_close(taken.model.encoder.patches.weight, of_folder.patches.weight)

    def test_an_elm_without_an_encoder(self, work, tmp_path):
        model, _ = new_elm(str(work / "llm"), architecture="text", representation="symbolic", num_samples=500)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="a text ELM, which has no encoder"):
            new_elm(str(work / "llm"), encoder=str(tmp_path), **SMALL)

    def test_what_is_pushed(self, elm_folder):
        files = gather(elm_folder, "model")
        assert {"my_parts.py", "own_code.py", "modeling_elm.py"} <= files.keys()
        check_loads(elm_folder, "model", trust_remote_code=True)

    def test_damaged(self, elm_folder, tmp_path):
        for path in elm_folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "my_parts.py").unlink()
        with pytest.raises(ValueError, match=r"no file my_parts\.py with a class MyEncoder"):
            load_elm(str(tmp_path), trust_remote_code=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["encoder_config"]["auto_map"]["AutoModel"] = "owner/name--my_parts.MyEncoder"
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"expected module\.Class, of a file module\.py there"):
            load_elm(str(tmp_path), trust_remote_code=True)


PRETRAINED = """
import torch
from transformers import AutoModel
whole = AutoModel.from_pretrained("run", trust_remote_code=True).eval()
encoder = AutoModel.from_pretrained("run/encoder", trust_remote_code=True).eval()
ecg = torch.sin(torch.arange(6000.0)).view(1, 12, 500)
print(type(encoder).__name__, torch.equal(whole.encoder(ecg).last_hidden_state, encoder(ecg).last_hidden_state))
"""


def test_pretraining(encoder_folder, tmp_path):
    """The code travels with the pretraining model and with its encoder, from which the next run goes on; it never runs unasked."""
    save_tiny_data(tmp_path / "data", train=8)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    args = ["--data", str(tmp_path / "data"), "--report_column", "messages", "--batch_size", "4", "--max_steps", "1"]
    args += ["--use_cpu", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
    new = ["--encoder", str(encoder_folder), "--text_encoder", str(tmp_path / "bert"), "--sampling_rate", "100"]
    new += ["--num_samples", "500"]
    stages = {"run": new, "again": ["--model_name_or_path", str(tmp_path / "run")]}
    for name, options in stages.items():
        options = [*args, *options, "--output_dir", str(tmp_path / name)]
        with pytest.raises(ValueError, match=r"code of its own.*--trust_remote_code"):
            pretrain.main(options)
        pretrain.main([*options, "--trust_remote_code"])
        assert {"my_parts.py", "own_code.py"} <= {path.name for path in (tmp_path / name).iterdir()}
    assert run_isolated(PRETRAINED, tmp_path) == "MyEncoder True\n"
    with pytest.raises(ValueError, match=r"elm push \S+encoder$"):
        kind_of(tmp_path / "run")
    folder = tmp_path / "run" / "encoder"
    assert kind_of(folder) == "encoder"
    assert "my_parts.py" in gather(folder, "encoder")
    with pytest.raises(ValueError, match=REFUSED):
        check_loads(folder, "encoder")
    check_loads(folder, "encoder", trust_remote_code=True)
    card = (folder / "README.md").read_text()
    assert "`my_encoder`: code of its own, `my_parts.MyEncoder`" in card
    assert "with their reports" in card
    assert "no labels" not in card


def test_registered_classes_need_no_code_of_a_folder(elm_folder, work, tmp_path):
    text = blocks()["my_parts.py"].replace('"my_encoder"', '"registered_encoder"')
    (tmp_path / "registered.py").write_text(text, encoding="utf-8")
    module = load_module(tmp_path / "registered.py")
    AutoConfig.register("registered_encoder", module.MyConfig)
    AutoModel.register(module.MyConfig, module.MyEncoder)
    model, processor = new_elm(str(work / "llm"), encoder=module.MyEncoder, **SMALL)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "elm")
    loaded, _ = load_elm(str(tmp_path / "elm"))
    assert type(loaded.model.encoder) is module.MyEncoder
    model.model.encoder.save_pretrained(tmp_path / "encoder")
    taken, _ = new_elm(str(work / "llm"), encoder=str(tmp_path / "encoder"), **SMALL)
    assert type(taken.model.encoder) is module.MyEncoder


def sft_args(work: Path, output_dir: Path, *options: str) -> list[str]:
    encoder = ["--encoder", str(work / "encoder"), "--num_ecg_tokens", "4", "--max_steps", "2"]
    return tiny_sft(work / "llm", work / "data", output_dir, *encoder, *options, encoder=None)


class TestTraining:
    def test_in_full_and_resumed(self, encoder_folder, work, tmp_path):
        with pytest.raises(ValueError, match=REFUSED):
            sft.main(sft_args(work, tmp_path / "refused"))
        steps = [
            "--trust_remote_code",
            "--save_strategy",
            "steps",
            "--save_steps",
            "1",
            "--update",
            "encoder",
            "connector",
        ]
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        sft.main(sft_args(work, whole, *steps))
        checkpoint = whole / "checkpoint-1"
        assert (checkpoint / "my_parts.py").is_file()
        sft.main(sft_args(work, resumed, *steps, "--resume_from_checkpoint", str(checkpoint)))
        assert losses(whole) == losses(resumed)
        one, two = (load_elm(str(folder), trust_remote_code=True)[0].state_dict() for folder in (whole, resumed))
        for name, weight in one.items():
            torch.testing.assert_close(weight, two[name], rtol=0, atol=0)
        before = load_encoder_part(encoder_folder, trust_remote_code=True).patches.weight
        assert not torch.equal(one["model.encoder.patches.weight"], before)

    def test_lora_and_a_stranger(self, encoder_folder, work, tmp_path, monkeypatch):
        """With a connector of a file; the base of the adapter has the code of both, and is made again of it."""
        monkeypatch.setenv("ELM_BASE_MODELS", str(tmp_path / "bases"))
        options = ["--connector", f"{work / 'my_parts.py'}:MyConnector", "--connector_config", '{"dropout": 0.1}']
        options += ["--use_peft", "--trust_remote_code", "--cache_features", "memory"]
        sft.main(sft_args(work, tmp_path / "adapter", *options))
        (base,) = (tmp_path / "bases").glob("*/config.json")
        assert (base.parent / "my_parts.py").is_file()
        with pytest.raises(ValueError, match=REFUSED):
            load_elm(str(tmp_path / "adapter"))
        model, processor = load_elm(str(tmp_path / "adapter"), trust_remote_code=True)
        expected = model.eval().get_ecg_features(ecg_values=records())
        for path in base.parent.iterdir():
            path.unlink()
        base.parent.rmdir()
        again, _ = load_elm(str(tmp_path / "adapter"), trust_remote_code=True)
        torch.testing.assert_close(again.eval().get_ecg_features(ecg_values=records()), expected)
        for part in (model, processor):
            part.save_pretrained(tmp_path / "stranger" / "elm")
        assert "MyEncoder MyConnector" in run_isolated(ANSWER, tmp_path / "stranger")

    def test_kept_features_are_of_the_code_too(self, elm_folder, tmp_path):
        model, _ = load_elm(str(elm_folder), trust_remote_code=True)
        first = EncoderFeatures(model.model, tmp_path).folder
        assert EncoderFeatures(model.model, tmp_path).folder == first
        features = EncoderFeatures(model.model).replace({"ecg_values": records()})["encoder_features"]
        assert features.shape == (2, 20, 16)  # all tokens: the connector pools with weights
        torch.testing.assert_close(
            model.eval().get_ecg_features(encoder_features=features), model.get_ecg_features(ecg_values=records())
        )
        for path in elm_folder.iterdir():
            (tmp_path / "other").mkdir(exist_ok=True)
            (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
        code = tmp_path / "other" / "my_parts.py"
        code.write_text(code.read_text().replace(".tanh()", ".sin()"))
        other, _ = load_elm(str(tmp_path / "other"), trust_remote_code=True)
        assert EncoderFeatures(other.model, tmp_path).folder != first


class TestWhatAnEncoderHasToDo:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("last_hidden_state=self.patches", "hidden_states=self.patches", "without a last_hidden_state"),
            (".transpose(1, 2).tanh()", ".mean(-1)", r"shape \[2, 64\] of 2 records; expected \[2, tokens, width\]"),
            (".transpose(1, 2).tanh()", ".tanh()", "tokens of width 20, and its configuration says 64"),
            (", lead_mask=None", "", r"fails on ecg_values \[2, 12, 500\] with a lead_mask.*TypeError"),
            (".tanh()", ".log()", "NaN or infinity of a silent record"),
            (".tanh()", ".tanh().bernoulli(p=0.5)", "other tokens of the same record each time"),
            (".tanh()", ".detach()", "No gradient reaches the weights of MyEncoder"),
            ("stride=25", "stride=250", "num_ecg_tokens=4, but the encoder makes 2 tokens"),
            ("    hidden_size: int = 64", "    embed: int = 64", "neither output_size nor hidden_size"),
            ('"my_encoder"', '"vit"', "MyConfig.model_type, 'vit', is that of another model"),
            ('"my_encoder"', '""', "MyConfig.model_type, '', is empty"),
            ("    config: MyConfig\n", "", "does not name its configuration"),
            (
                "        self.post_init()",
                "        self.register_buffer('positions', self.patches.bias.detach() + 1, persistent=False)\n"
                "        self.post_init()",
                "buffers that are not saved, and lost when it is loaded: positions",
            ),
            (
                "        self.post_init()",
                "        self.patches.bias.sum().item()\n        self.post_init()",
                "without values",
            ),
            ("from torch import nn", "import beside\nfrom torch import nn", "beside lies beside it, but is not saved"),
            (
                "from torch import nn",
                "from torch import nn\n\nif nn is None:\n    from . import beside",
                "only `from .name import",
            ),
        ],
    )
    def test_faults(self, work, tmp_path, monkeypatch, old, new, message):
        text = blocks()["my_parts.py"]
        assert old in text
        text = text.replace(old, new)
        text = text.replace("config.hidden_size", "config.embed") if "embed" in new else text
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "beside.py").write_text("")
        (tmp_path / "faulty.py").write_text(text, encoding="utf-8")
        module = load_module(tmp_path / "faulty.py")
        with pytest.raises(ValueError, match=message):
            new_elm(str(work / "llm"), encoder=module.MyEncoder, **SMALL)

    def test_no_encoder(self, work, parts):
        llm = str(work / "llm")
        for wrong in (nn.Linear, 3, object()):
            with pytest.raises(ValueError, match="is no PreTrainedModel"):
                new_elm(llm, encoder=wrong, **SMALL)
        with pytest.raises(ValueError, match="reads the samples of records"):
            new_elm(llm, encoder=parts.MyEncoder, representation="rgb")
        with pytest.raises(ValueError, match="MyConfig has no field depth"):
            new_elm(llm, encoder=parts.MyEncoder, encoder_config={"depth": 3}, **SMALL)
        model = parts.MyEncoder(parts.MyConfig(num_samples=500))
        with pytest.raises(ValueError, match="whose own config stands"):
            new_elm(llm, encoder=model, encoder_config={"hidden_size": 3}, **SMALL)

    def test_records_of_another_size(self, work, parts):
        model = parts.MyEncoder(parts.MyConfig(num_samples=1000))
        with pytest.raises(ValueError, match=r"reads records of 12 leads x 1000 samples.*--num_samples 1000"):
            new_elm(str(work / "llm"), encoder=model, **SMALL)

    def test_a_class_of_main(self, work):
        main = type("MyEncoder", (PreTrainedModel,), {"__module__": "__main__"})
        from elm_ecg.own_code import own_files

        with pytest.raises(ValueError, match="defined in __main__, whose code cannot be saved"):
            own_files(main)

    def test_a_name_of_ours(self, work, tmp_path):
        (tmp_path / "modeling_elm.py").write_text(blocks()["my_parts.py"], encoding="utf-8")
        before = sys.modules.pop("modeling_elm", None)
        module = load_module(tmp_path / "modeling_elm.py")
        with pytest.raises(ValueError, match="has the name of another file that is saved with the model; rename it"):
            new_elm(str(work / "llm"), encoder=module.MyEncoder, **SMALL)
        sys.modules.pop("modeling_elm")
        if before is not None:
            sys.modules["modeling_elm"] = before


class TestWhatAConnectorHasToDo:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("config.num_ecg_tokens)", "3)", r"MyConnector makes \[1, 3, 32\] of one ECG; expected .*\[1, 4, 32\]"),
            ("weights @ tokens)", "weights @ tokens.mT)", "MyConnector fails on what it reads of one silent ECG"),
            ("return self.projection(", "return self.projection.bias / 0 + self.projection(", "NaN or infinity"),
            (".softmax(dim=1)", ".softmax(dim=1).bernoulli()", "other embeddings of the same ECG each time"),
            (
                "    def forward(self, tokens)",
                "    def pool(self, tokens, mask=None):\n        return tokens * self.scores.bias.mean()\n\n"
                "    def forward(self, tokens)",
                "MyConnector.pool has weights",
            ),
            (
                "        self.dropout =",
                "        self.register_buffer('table', self.scores.bias.detach(), persistent=False)\n        self.dropout =",
                "buffers that are not saved, and lost when it is loaded: table",
            ),
            ("weights @ tokens))", "weights @ tokens)).detach()", "No gradient reaches the weights of MyConnector"),
        ],
    )
    def test_faults(self, work, tmp_path, old, new, message):
        text = blocks()["my_parts.py"]
        assert old in text
        (tmp_path / "faulty.py").write_text(text.replace(old, new), encoding="utf-8")
        module = load_module(tmp_path / "faulty.py")
        options = {"encoder_config": TINY_ENCODERS["mtae"], **SMALL}
        with pytest.raises(ValueError, match=message):
            new_elm(str(work / "llm"), encoder="mtae", connector=module.MyConnector, **options)

    def test_fields(self, work, parts):
        llm = str(work / "llm")
        with pytest.raises(ValueError, match="MyConnector connector has no field depth; it has dropout"):
            new_elm(llm, encoder=parts.MyEncoder, connector=parts.MyConnector, connector_config={"depth": 3}, **SMALL)
        with pytest.raises(ValueError, match="the linear connector has no field depth; it has none"):
            new_elm(llm, encoder=parts.MyEncoder, connector_config={"depth": 3}, **SMALL)

    def test_of_the_command_line(self, work):
        llm = str(work / "llm")
        for connector, message in (
            ("perceivr", "FILE.py:Class of your own.*Did you mean perceiver"),
            ("nowhere.py:MyConnector", "there is no file nowhere.py"),
            (f"{work / 'my_parts.py'}:Missing", r"no file my_parts\.py with a class Missing"),
            (f"{work / 'my_parts.py'}:MyConfig", r"MyConfig is no torch\.nn\.Module"),
            ("unknown.Connector", "The code of the connector unknown.Connector is not loaded"),
        ):
            with pytest.raises(ValueError, match=message):
                new_elm(llm, encoder="mtae", encoder_config=TINY_ENCODERS["mtae"], connector=connector, **SMALL)

    def test_its_weights_begin_as_it_leaves_them(self, work, tmp_path):
        text = blocks()["my_parts.py"].replace(
            "        self.dropout =", "        nn.init.constant_(self.scores.weight, 3.0)\n        self.dropout ="
        )
        (tmp_path / "constant.py").write_text(text, encoding="utf-8")
        module = load_module(tmp_path / "constant.py")
        model, _ = new_elm(str(work / "llm"), encoder=module.MyEncoder, connector=module.MyConnector, **SMALL)
        assert (model.model.connector.scores.weight == 3).all()

    def test_of_a_record_without_an_encoder(self, work, tmp_path):
        (tmp_path / "fuyu.py").write_text(
            "from torch import nn\n\n\nclass Whole(nn.Module):\n    def __init__(self, config):\n        super().__init__()\n"
            "        self.linear = nn.Linear(config.num_samples, config.text_config.hidden_size)\n\n"
            "    def forward(self, ecg_values):\n        return self.linear(ecg_values)\n"
        )
        connector = f"{tmp_path / 'fuyu.py'}:Whole"
        options = {"architecture": "fuyu", "num_ecg_tokens": 12, "num_samples": 500}
        model, processor = new_elm(str(work / "llm"), connector=connector, **options)
        for part in (model, processor):
            part.save_pretrained(tmp_path / "elm")
        loaded, _ = load_elm(str(tmp_path / "elm"), trust_remote_code=True)
        torch.testing.assert_close(
            loaded.eval().get_ecg_features(ecg_values=records()), model.eval().get_ecg_features(ecg_values=records())
        )
        with pytest.raises(ValueError, match=r"code of its own, fuyu\.Whole"):
            load_elm(str(tmp_path / "elm"))
