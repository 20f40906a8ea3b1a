"""GPU memory that training takes, for language models of 1B, 3B and 7B in full, by LoRA and by QLoRA, without a GPU.

    python benchmarks/memory.py                 # a Markdown table, about three minutes on one core
    python benchmarks/memory.py --check --batch_size 1 --tokens 64 --learnt 8   # for a small model, beside what its training takes

The second takes two minutes on one core, and far longer for larger sizes, as few CPUs compute in bfloat16.

Steps of the very model run on PyTorch's fake tensors, which have shapes and no values, and all tensors that live are counted: weights,
gradients, AdamW's states, activations and temporary ones, at their largest together. Two and four layers of the language model are followed and the others are
alike, so the rest is a straight line. Weights are float32 where all are trained, else bfloat16; all is computed under bf16 autocast with
gradient checkpointing; LoRA has rank 16 on all linear layers; the connector is trained and ST-MEM frozen; the head runs at learnt tokens
alone. QLoRA is LoRA with the layers' matrices at 4.127 bits (NF4, double quantization) and the largest one unpacked in bfloat16. CUDA
itself and gaps between tensors come on top, 1 to 2 GiB.
"""

import argparse
import copy
import logging
import resource
import subprocess
import sys
import warnings
import weakref
from typing import Any

import torch
from common import SHAPES
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, PreTrainedConfig

from elm_ecg.configuration_ecg_encoders import STMEMConfig
from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.modeling_elm import ELMForConditionalGeneration

Bytes = dict[str, float]
GIB = 2**30
SMALL = LlamaConfig(
    vocab_size=16000,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=4,
    num_attention_heads=12,
    tie_word_embeddings=False,
)
NF4_BYTES = 4.127 / 8  # of a weight: 4 bits, and its share of a scale for 64 of them, which are quantized too
MATRICES = r".*language_model\.layers\..*_proj"  # the linear layers of LLMs as these


def config_of(shape: PreTrainedConfig) -> ELMConfig:
    parts = {"encoder_config": STMEMConfig(), "connector": "linear", "num_ecg_tokens": 12}
    return ELMConfig(text_config=copy.deepcopy(shape), ecg_token_id=shape.vocab_size - 1, **parts)


def build(shape: PreTrainedConfig, num_layers: int, lora: bool) -> torch.nn.Module:
    """An ELM around a language model of so many layers, ready to be trained."""
    config = config_of(shape)
    config.text_config.update({"num_hidden_layers": num_layers})
    model = ELMForConditionalGeneration._from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
    model.model.encoder.requires_grad_(False)
    if lora:
        peft_config = LoraConfig(r=16, target_modules=MATRICES, modules_to_save=["model.connector"])
        model = get_peft_model(model, peft_config).base_model.model
    model.model.language_model.gradient_checkpointing_enable()
    return model.train()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch_size: int, tokens: int, learnt: int) -> None:
    """A step as `elm sft` takes it: one ECG at the beginning of each chat, the answer at its end."""
    input_ids = torch.zeros(batch_size, tokens - 12, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        ecgs = model.get_ecg_features(ecg_values=torch.zeros(batch_size, 12, 2500))
        words = model.get_input_embeddings()(input_ids)
        inputs_embeds = torch.cat([ecgs.to(words.dtype), words], 1)
        hidden = model.model.language_model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -learnt:]).float()
        loss = cross_entropy(logits.flatten(0, 1), input_ids[:, -learnt:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within, while they live: `now`, and at most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary()  # storages; a view has that of its base

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def followed(shape: PreTrainedConfig, num_layers: int, lora: bool, sizes: tuple[int, int, int]) -> Bytes:
    """Bytes of a second step, when the optimizer has its states."""
    with torch.device("meta"):
        model = build(shape, num_layers, lora)
    with FakeTensorMode(), Allocated() as allocated:
        fake: dict[int, torch.Tensor] = {}  # tied weights stay one
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in fake:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        fake[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    tensors[name] = fake[id(tensor)]
        weights = allocated.now
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        train(model, optimizer, *sizes)
        at_rest, allocated.peak = allocated.now, 0
        train(model, optimizer, *sizes)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return {"weights": weights, "gradients": gradients, "AdamW": at_rest - weights, "peak": allocated.peak}


def of_all_layers(shape: PreTrainedConfig, lora: bool, sizes: tuple[int, int, int]) -> Bytes:
    """As `followed`, of all layers of the shape, from two and four of them."""
    two, four = followed(shape, 2, lora, sizes), followed(shape, 4, lora, sizes)
    more = (shape.num_hidden_layers - 2) / 2
    return {kind: two[kind] + more * (four[kind] - two[kind]) for kind in two}


def quantized(lora: Bytes, shape: PreTrainedConfig) -> Bytes:
    """The bytes of LoRA with the matrices of the layers in NF4."""
    with torch.device("meta"):
        layers = ELMForConditionalGeneration(config_of(shape)).model.language_model.layers
    sizes = [module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    saved, unpacked = (2 - NF4_BYTES) * sum(sizes), 2 * max(sizes)
    return lora | {"weights": lora["weights"] - saved, "peak": lora["peak"] - saved + unpacked}


def resident() -> float:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(sizes: tuple[int, int, int]) -> None:
    """What steps of a small model really take on the CPU, each in a process of its own, beside the sums."""
    print("| training | followed, MiB | process, MiB |\n| --- | --- | --- |")
    for training in ("full", "LoRA"):
        command = [sys.executable, __file__, "--measure", training, "--batch_size", str(sizes[0])]
        command += ["--tokens", str(sizes[1]), "--learnt", str(sizes[2])]
        measured = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        total = of_all_layers(SMALL, training == "LoRA", sizes)["peak"]
        print(f"| {training} | {total / 2**20:.0f} | {measured / 2**20:.0f} |", flush=True)


def measure(training: str, sizes: tuple[int, int, int]) -> None:
    """Prints the bytes by which this process grows as it builds and trains the small model."""
    warm_up = torch.nn.Linear(8, 8)  # what libraries allocate at their first use
    torch.optim.AdamW(warm_up.parameters(), fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        warm_up(torch.zeros(8, 8)).sum().backward()
    before = resident()
    model = build(SMALL, SMALL.num_hidden_layers, training == "LoRA")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], fused=True)
    for _ in range(2):
        train(model, optimizer, *sizes)
    print(resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="chats; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="of a chat; default: %(default)s")
    parser.add_argument("--learnt", type=int, default=64, help="of them in answers; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="compare with a process on the CPU")
    parser.add_argument("--measure", choices=["full", "LoRA"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (args.batch_size, args.tokens, args.learnt)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # PEFT and we use a name that transformers is about to change
    if args.measure:
        return measure(args.measure, sizes)
    if args.check:
        return check(sizes)
    print(f"{args.batch_size} chats of {args.tokens} tokens, {args.learnt} of them learnt; GiB\n")
    print("| LLM | training | weights | gradients | AdamW | peak |\n| --- | --- | --- | --- | --- | --- |")
    for name, shape in SHAPES.items():
        lora = of_all_layers(shape, True, sizes)
        kinds = {"full": of_all_layers(shape, False, sizes), "LoRA": lora, "QLoRA": quantized(lora, shape)}
        for training, sums in kinds.items():
            cells = [f"{size / GIB:.1f}" for size in sums.values()]
            print(f"| {name.rpartition('-')[2]} ({name}) | {training} | {' | '.join(cells)} |", flush=True)
    return None


if __name__ == "__main__":
    main()
