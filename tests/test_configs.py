"""Recipes and accelerate configurations are read as their users read them."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from elm_ecg.training import pretrain, rl, sft
from elm_ecg.training.llms import LLMS
from elm_ecg.training.parser import recipes
from helpers import ROOT

RECIPES, OF_PRETRAINING, OF_RL = recipes(), recipes("elm pretrain"), recipes("elm rl")
ACCELERATE_CONFIGS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


def test_each_recipe_is_of_a_command() -> None:
    names = {path.stem for path in (ROOT / "training" / "configs").glob("*.yaml")}
    assert sorted(names) == sorted([*RECIPES, *OF_PRETRAINING, *OF_RL])


@pytest.mark.parametrize("name", OF_PRETRAINING)
def test_recipe_of_pretraining(name: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(OF_PRETRAINING[name].read_text())
    text = [] if "merl" not in name or "text_encoder" in recipe else ["--text_encoder", "bert"]
    args, training_args = pretrain.parse(["--config", name, "--data", "data", "--output_dir", str(tmp_path), *text])
    parsed = {**vars(training_args), **vars(args)}
    changed = {name for name, value in recipe.items() if parsed[name] != value}
    assert changed <= {"report_to"}, "an option of the recipe is not what the parser makes of it"
    assert args.objectives == ["contrastive" if "merl" in name else "masked"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPES[name].read_text())
    args, training_args, model_args = sft.parse(["--config", name, "--data", "data", "--output_dir", str(tmp_path)])
    parsed = {**vars(model_args), **vars(training_args), **vars(args)}
    changed = {name for name, value in recipe.items() if parsed[name] != value}
    assert changed <= {"report_to"}, "an option of the recipe is not what the parser makes of it"
    assert training_args.report_to == []
    assert args.llm in LLMS
    assert recipe.get("llm", args.llm) == args.llm


@pytest.mark.parametrize("name", OF_RL)
def test_recipe_of_reinforcement_learning(name: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(OF_RL[name].read_text())
    args, training_args, _ = rl.parse(["--config", name, "--data", "data", "--output_dir", str(tmp_path)])
    parsed = {**vars(training_args), **vars(args)}
    changed = {name for name, value in recipe.items() if parsed[name] != value}
    assert changed <= {"report_to"}, "an option of the recipe is not what the parser makes of it"
    assert training_args.report_to == []


def test_a_recipe_with_an_unknown_option(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rat: 1.0e-4\n")
    with pytest.raises(ValueError, match="learning_rat"):
        sft.parse(["--config", str(path), "--data", "data", "--output_dir", str(tmp_path)])


def test_accelerate_configs_are_all_here() -> None:
    paths = (ROOT / "training" / "accelerate_configs").glob("*.yaml")
    assert {path.stem for path in paths} == set(ACCELERATE_CONFIGS)


@pytest.mark.parametrize(("name", "distributed_type"), ACCELERATE_CONFIGS.items())
def test_accelerate_config(name: str, distributed_type: DistributedType) -> None:
    config = load_config_from_file(str(ROOT / "training" / "accelerate_configs" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == distributed_type
    assert config.mixed_precision == "bf16"
    assert config.num_processes > 1
    assert not config.use_cpu
    if name == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
    if distributed_type == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
