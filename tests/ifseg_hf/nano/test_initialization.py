"""Initial weights with which an OFA is a look-up of patches among words."""

import pytest
import torch

from ifseg_hf.modeling.backbone_ofa import OFABackbone
from ifseg_hf.nano.configuration import nano_config
from ifseg_hf.nano.initialization import HIGHEST_FREQUENCY, begin_as_lookup, column_shift, wave_positions

D_MODEL, HEADS = 192, 4
WORDS = range(5, 45)


@pytest.fixture(scope="module")
def backbone():
    """An OFA with layers of the nano model's size, whose token embeddings are random words of unit length."""
    torch.manual_seed(0)
    changes = {"trunk_hidden_sizes": (4, 4, 4, 4, 4, 4, 4), "trunk_depths": (1,) * 7, "trunk_embedding_size": 4}
    backbone = OFABackbone(nano_config(60, **changes)).eval()
    begin_as_lookup(backbone.model)
    with torch.no_grad():
        words = backbone.get_input_embeddings().weight
        words.copy_(torch.nn.functional.normalize(torch.randn_like(words), dim=1))
    return backbone


def test_positions_have_one_length_and_differ():
    rows, columns = (x.flatten().float() for x in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    positions = wave_positions(rows, columns, D_MODEL, HEADS)
    assert positions.shape == (81, D_MODEL)
    products = positions @ positions.T / (D_MODEL / 2)
    torch.testing.assert_close(products.diagonal(), torch.ones(81))
    assert (products - torch.eye(81)).max() < 0.95


def test_column_shift_moves_positions_by_one_column():
    rows, columns = torch.tensor([0.0, 3, 17, 40]), torch.tensor([-1.0, 0, 22, 39])
    shift = column_shift(D_MODEL, HEADS)
    moved = wave_positions(rows, columns, D_MODEL, HEADS) @ shift.T
    torch.testing.assert_close(moved, wave_positions(rows, columns + 1, D_MODEL, HEADS), atol=1e-4, rtol=0)
    torch.testing.assert_close(shift @ shift.T, torch.eye(D_MODEL), atol=1e-5, rtol=0)
    assert torch.pi > HIGHEST_FREQUENCY


@pytest.mark.parametrize("grid", [(8, 10), (20, 12)])
@torch.no_grad()
def test_each_patch_is_named_by_its_own_word(backbone, grid):
    generator = torch.Generator().manual_seed(1)
    words = backbone.get_input_embeddings().weight[list(WORDS)]
    labels = torch.randint(len(words), grid, generator=generator)
    noise = 0.3 * torch.randn(*grid, D_MODEL, generator=generator) / D_MODEL**0.5
    encoded = backbone.encode(torch.tensor([[0, *WORDS[:20], 2]]), image_tokens=(words[labels] + noise)[None])
    decoded = backbone.decode_patches(encoded).last_hidden_state[0].unflatten(0, grid)
    logits = decoded @ words.T
    right = logits.argmax(2) == labels
    assert right[:, 1:].float().mean() > 0.97  # the position after the last column's is no position of the next row
    margins = logits.gather(2, labels[..., None])[..., 0] - logits.mean(2)
    assert 5 < margins[:, 1:].mean() < 25


@torch.no_grad()
def test_cross_attention_peaks_at_the_next_patch(backbone):
    grid = (8, 10)
    words = backbone.get_input_embeddings().weight
    encoded = backbone.encode(torch.tensor([[0, 2]]), image_tokens=words[torch.randint(60, (1, *grid))])
    attentions = backbone.decode_patches(encoded, output_attentions=True).cross_attentions
    for attention in attentions:
        attention = attention[0, :, :80, :80].mean(0)  # query i is `<s>` or patch i - 1
        inner = torch.tensor([i for i in range(80) if i % 10])
        assert (attention[inner].argmax(1) == inner).all()
        assert attention[inner, inner].mean() > 0.3


def test_values_pass_unchanged_and_relative_biases_are_zero(backbone):
    model = backbone.model
    for stack in (model.encoder, model.decoder):
        assert not any(parameter.any() for parameter in stack.image_rel_pos_table_list.parameters())
        for layer in stack.layers:
            assert torch.equal(layer.self_attn.out_proj.weight @ layer.self_attn.v_proj.weight, torch.eye(D_MODEL))
