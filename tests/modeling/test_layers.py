import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ifseg_hf.modeling.attention_ofa import OFAAttention
from ifseg_hf.modeling.configuration_ofa import OFAConfig
from ifseg_hf.modeling.layers_ofa import OFALayerNorm, drop_path, dropout


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3), st.floats(0.0, 1.0), st.sampled_from(["float32", "bfloat16"])
)
def test_dropout_zeroes_elements_and_rescales_the_others(shape, rate, dtype):
    """For any number of elements, with the same elements in the gradient."""
    inputs = torch.ones(shape, dtype=getattr(torch, dtype), requires_grad=True)
    outputs = dropout(inputs, rate, training=True)
    outputs.sum().backward()
    assert outputs.dtype == inputs.dtype
    assert torch.equal(inputs.grad, outputs)
    kept = outputs[outputs != 0].float()
    if rate < 1:
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=0.01, atol=1e-4 / (1 - rate) ** 2)
    else:
        assert not kept.numel()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.99])
def test_dropout_zeroes_as_many_elements_as_torch(rate):
    torch.manual_seed(0)
    outputs = dropout(torch.ones(4, 250_000).T, rate, training=True)  # not contiguous
    share = (outputs == 0).double().mean(0)
    assert (share - rate).abs().max() < 5 * (rate * (1 - rate) / 250_000) ** 0.5
    assert abs(outputs.double().mean() - 1) < 0.03
    # of neighbours, which share a random number, one says nothing about the other
    zero = (outputs[:, 0] == 0).double().unflatten(0, (-1, 4))
    assert (torch.corrcoef(zero.T) - torch.eye(4)).abs().max() < 0.02


def test_dropout_is_repeatable_and_absent_without_training():
    inputs = torch.randn(7, 9)
    first, second = (torch.manual_seed(seed) and dropout(inputs, 0.5, training=True) for seed in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, dropout(inputs, 0.5, training=True))
    assert dropout(inputs, 0.5, training=False) is inputs
    assert dropout(inputs, 0.0, training=True) is inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drop_path_zeroes_samples_and_rescales_the_others(dtype):
    torch.manual_seed(0)
    inputs = torch.ones(5000, 2, dtype=dtype)
    outputs = drop_path(inputs, 0.3, training=True)
    assert torch.equal(outputs[:, 0], outputs[:, 1])
    assert outputs.unique().tolist() == [0, (torch.ones(1, dtype=dtype) / 0.7).item()]
    assert abs(outputs.mean() - 1) < 0.03
    assert torch.equal(drop_path(inputs, 0.3, training=False), inputs)


def test_layer_norm_keeps_the_dtype_of_its_input_under_autocast():
    generator = torch.Generator().manual_seed(0)
    norm, expected = OFALayerNorm(64), torch.nn.LayerNorm(64)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    expected.load_state_dict(norm.state_dict())
    inputs = 3 * torch.randn(10, 64, generator=generator) + 100
    assert torch.equal(norm(inputs), expected(inputs))
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(inputs.bfloat16())
        assert norm(inputs).dtype == torch.float32
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected(inputs.bfloat16().float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cross", [False, True])
def test_attention_casts_its_inputs_once_under_autocast(cross, monkeypatch):
    torch.manual_seed(0)
    attention = OFAAttention(OFAConfig.preset("tiny", attn_implementation="sdpa"), 4, 0)
    inputs = {"hidden_states": torch.randn(2, 6, 256), "attention_bias": torch.randn(1, 4, 6, 6)}
    if cross:
        inputs["key_value_states"] = torch.randn(2, 6, 256)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention(**inputs)
        monkeypatch.setattr(OFAAttention, "_cast", lambda self, x: x)
        expected, _ = attention(**inputs)
    assert torch.equal(found, expected)
