import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.modeling_ecg_contrastive import SigmoidLoss, info_nce
from helpers import fork_two

seeds = st.integers(0, 2**31)


def rows(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, 5, generator=generator).unbind()


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


@given(number=st.integers(1, 6), seed=seeds, temperature=st.floats(0.05, 2), data=st.data())
def test_info_nce_is_as_written_by_hand(number, seed, temperature, data):
    first, second = rows(number, seed)
    counted = data.draw(st.lists(st.booleans(), min_size=number, max_size=number))
    indices = [index for index in range(number) if counted[index]]
    total = 0.0
    for i in indices:
        for one, other in ((first, second), (second, first)):
            similarities = {j: cosine(one[i], other[j]) / temperature for j in indices}
            total -= similarities[i] - math.log(sum(map(math.exp, similarities.values())))
    expected = total / max(len(indices), 1)
    loss = info_nce(first, second, temperature, torch.tensor(counted)).item()
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(number=st.integers(1, 6), seed=seeds, scale=st.floats(0.1, 20), bias=st.floats(-12, 2), data=st.data())
def test_sigmoid_loss_is_that_of_the_paper(number, seed, scale, bias, data):
    """arXiv 2303.15343, equation 1, with the bias as in its algorithm 1: it is added to the similarities."""
    ecgs, texts = rows(number, seed)
    has_report = data.draw(st.lists(st.booleans(), min_size=number, max_size=number))
    indices = [index for index in range(number) if has_report[index]]
    total = 0.0
    for i in indices:
        for j in indices:
            sign = 1 if i == j else -1
            total += math.log(1 / (1 + math.exp(sign * (-scale * cosine(ecgs[i], texts[j]) - bias))))
    module = SigmoidLoss()
    torch.nn.init.constant_(module.log_scale, math.log(scale))
    torch.nn.init.constant_(module.bias, bias)
    loss = module(ecgs, texts, torch.tensor(has_report)).item()
    assert loss == pytest.approx(-total / max(len(indices), 1), rel=1e-4, abs=1e-5)


def test_sigmoid_loss_begins_as_in_the_paper():
    module = SigmoidLoss()
    assert module.log_scale.exp().item() == pytest.approx(10)
    assert module.bias.item() == -10


def test_no_rows_have_gradients_all_the_same():
    first, second = (part.requires_grad_() for part in rows(3, 0))
    nobody = torch.zeros(3, dtype=torch.bool)
    for loss in (info_nce(first, second, 0.07, nobody), SigmoidLoss()(first, second, nobody)):
        assert loss.item() == 0
        first.grad = None
        loss.backward()
        assert not first.grad.any()


CODE = """
import json
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, "tests")
from test_modeling_ecg_contrastive import case, gradients_of

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for number, options in enumerate(json.loads(sys.argv[1])):
    model, batch = case(**options)
    half = {name: tensor[4 * rank :][:4] for name, tensor in batch.items()}
    result = gradients_of(DistributedDataParallel(model), half)
    torch.save(result, f"{sys.argv[2]}/{number}_{rank}.pt")
torch.distributed.destroy_process_group()
"""
CASES = [
    {"kind": "mtae", "objectives": "contrastive", "loss": "infonce"},
    {"kind": "mtae", "objectives": "contrastive", "loss": "sigmoid"},
    {"kind": "merl", "objectives": "contrastive", "loss": "infonce", "training": False},
    {"kind": "st_mem", "objectives": "both", "loss": "infonce"},
]


def case(kind, objectives, loss, training=True):
    """A model without dropout, and eight records, some without report."""
    from test_modeling_ecg_pretraining import batch_of, mask_of, tiny

    model = tiny(
        kind, objectives, contrastive_loss=loss, text={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    batch = batch_of(8, text=True)
    batch["has_report"] = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1]).bool()
    if objectives == "both":
        batch["mask"] = mask_of(model.config, 8)
    return model.train(training), batch


def gradients_of(model, batch):
    loss = model(**batch).loss
    loss.backward()
    names = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **names}


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    """Each with half of the batch: the negatives of both, and gradients through them."""
    for process in [fork.finish() for fork in fork_two(CODE, json.dumps(CASES), str(tmp_path))]:
        assert process.returncode == 0, process.stderr[-3000:]
    for number, options in enumerate(CASES):
        model, batch = case(**options)
        expected = gradients_of(model, batch)
        found = [torch.load(tmp_path / f"{number}_{rank}.pt") for rank in (0, 1)]
        assert (found[0]["loss"] + found[1]["loss"]).item() / 2 == pytest.approx(expected["loss"].item(), abs=1e-5)
        assert found[0].keys() == expected.keys()
        for name, gradient in expected.items():
            if name != "loss":
                torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-5)
                assert torch.equal(found[0][name], found[1][name])
        alone = gradients_of(case(**options)[0], {name: tensor[:4] for name, tensor in batch.items()})
        assert abs(alone["loss"] - expected["loss"]) > 0.1  # with the negatives of four records alone
