import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from elm_ecg.configuration_ecg_encoders import MERLConfig, XResNet1dConfig
from elm_ecg.modeling_ecg_encoders import XResNet1dModel
from elm_ecg.modeling_ecg_resnets import XResNetBlock


def xresnet(seed=0, **fields):
    """A small one in which no tensor is trivial."""
    torch.manual_seed(seed)
    model = XResNet1dModel(XResNet1dConfig(**{"num_leads": 3, "depths": [2, 1], "widths": [6, 10], **fields})).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def conv_norm(hidden_states, weights, name, stride=1):
    kernel, norm = weights[f"{name}.conv.weight"], f"{name}.norm"
    hidden_states = functional.conv1d(hidden_states, kernel, stride=stride, padding=kernel.shape[2] // 2)
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, scale, shift = (weights[f"{norm}.{key}"][:, None] for key in names)
    return (hidden_states - mean) / (var + 1e-5).sqrt() * scale + shift


def mean_of_pairs(hidden_states):
    """[batch, channels, length]; the last sample of an odd length stays as it is."""
    pairs = [hidden_states[..., start : start + 2].mean(-1) for start in range(0, hidden_states.shape[-1], 2)]
    return torch.stack(pairs, -1)


def recompute(model, ecg_values):
    """The tokens, by the papers' description and the names of the weights."""
    weights = model.state_dict()
    hidden_states = functional.relu(conv_norm(ecg_values, weights, "stem.0", stride=2))
    for conv in (2, 4):
        hidden_states = functional.relu(conv_norm(hidden_states, weights, f"stem.{conv}"))
    padded = functional.pad(hidden_states, (1, 1), value=-torch.inf)  # a maximum of three, at every second place
    hidden_states = torch.stack([padded[..., start : padded.shape[-1] - 2 + start : 2] for start in range(3)]).amax(0)
    bottleneck = model.config.block == "bottleneck"
    for stage, depth in enumerate(model.config.depths):
        for block in range(depth):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            shortcut = mean_of_pairs(hidden_states) if stride == 2 else hidden_states
            at = int(stride == 2)  # of the convolution in the shortcut, behind the average
            if f"{name}.shortcut.{at}.conv.weight" in weights:
                shortcut = conv_norm(shortcut, weights, f"{name}.shortcut.{at}")
            for conv in range(3 if bottleneck else 2):
                on_kernel = conv == (1 if bottleneck else 0)
                hidden_states = conv_norm(hidden_states, weights, f"{name}.convs.{conv}", stride if on_kernel else 1)
                last = conv == (2 if bottleneck else 1)
                hidden_states = functional.relu(hidden_states + shortcut if last else hidden_states)
    return hidden_states.transpose(1, 2)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@given(
    num_samples=st.integers(1, 70), kernel_size=st.sampled_from([1, 3, 5]), widths=st.sampled_from([(6, 10), (4, 4)])
)
def test_xresnet_is_that_of_the_papers(block, num_samples, kernel_size, widths):
    model = xresnet(block=block, kernel_size=kernel_size, widths=widths)
    ecg_values = torch.randn(2, 3, num_samples, generator=torch.Generator().manual_seed(num_samples))
    with torch.inference_mode():
        tokens, expected = model(ecg_values).last_hidden_state, recompute(model, ecg_values)
    assert tokens.shape == (2, -(-num_samples // 8), widths[-1] * (4 if block == "bottleneck" else 1))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_new_blocks_are_their_shortcuts():
    torch.manual_seed(0)
    model = XResNet1dModel(XResNet1dConfig(num_leads=3, depths=[2, 1], widths=[6, 10]))
    blocks = [module for module in model.modules() if isinstance(module, XResNetBlock)]
    assert len(blocks) == 3
    hidden_states = torch.randn(2, 6, 20)
    for block in blocks:
        torch.testing.assert_close(block(hidden_states), block.shortcut(hidden_states).relu())
        assert all((conv.norm.weight == 1).all() for conv in block.convs[:-1])


def test_that_of_the_benchmark():
    config = XResNet1dConfig(block="bottleneck", depths=(3, 4, 23, 3), widths=(64, 128, 256, 512))
    with torch.device("meta"):
        model = XResNet1dModel(config)
    assert config.output_size == 2048
    convs = [name for name, _ in model.named_modules() if name.endswith(".conv") and "shortcut" not in name]
    assert len(convs) == 3 + 3 * (3 + 4 + 23 + 3)  # three in place of the first of 101 layers, and no last, linear one


@pytest.mark.parametrize("config_class", [MERLConfig, XResNet1dConfig])
@pytest.mark.parametrize("kernel_size", [-1, 0, 4])
def test_kernel_without_a_middle(config_class, kernel_size):
    message = f"{config_class.__name__}.kernel_size is {kernel_size} samples; expected an odd number"
    with pytest.raises(StrictDataclassError, match=message):
        config_class(kernel_size=kernel_size)
