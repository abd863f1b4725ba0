"""Training with transformers' Trainer, compared with our own loop on the same samples."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import is_key_bias, save_tiny_model
from transformers import Trainer, TrainingArguments, pipeline, set_seed

from ifseg_hf import NANO
from ifseg_hf.data.word_maps import WordMapCollator, word_map_stream
from ifseg_hf.evaluation.metrics import scores
from ifseg_hf.modeling import IFSegConfig, IFSegForSemanticSegmentation
from ifseg_hf.processing import IFSegProcessor, resized_argmax
from ifseg_hf.training.loop import TrainingConfig, train

WORDS = ["cat", "cup", "sky"]
STEPS, BATCH, RATE = 8, 4, 1e-2


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def trainer(folder: str, output, categories=WORDS, dropout: float = 0.0, **arguments) -> Trainer:
    """A Trainer as users write it; by default without dropout and weight decay, so that runs can be compared."""
    set_seed(0)
    processor = IFSegProcessor.from_pretrained(folder)
    config = IFSegConfig.from_pretrained(folder)
    config.backbone_config.dropout = config.backbone_config.drop_path_rate = dropout
    model = IFSegForSemanticSegmentation.from_pretrained(folder, config=config, dtype=torch.float32)
    model.set_words(**processor.encode_categories(categories))
    model.freeze_for_word_maps()
    config = model.config
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "remove_unused_columns": False,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(
            str(output),
            lr_scheduler_type="cosine",
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=word_map_stream(
            len(config.word_ids or config.category_ids),
            grid_size=config.grid_size,
            word_categories=config.word_categories,
            block_size=arguments["per_device_train_batch_size"],
        ),
        data_collator=WordMapCollator(config.image_size, config.word_categories),
        processing_class=processor,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def assert_same(run: Trainer, ours: tuple[dict, float], atol: float = 1e-5):
    weights, last_loss = ours
    assert losses(run)[-1] == pytest.approx(last_loss, abs=1e-3)
    found = run.model.state_dict()
    for name, tensor in weights.items():
        if not is_key_bias(name):  # Adam scales their rounding noise to whole steps
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def ours(tiny_model, tmp_path_factory) -> tuple[dict, float]:
    """Weights and last loss of our own loop with the same settings."""
    folder = str(tmp_path_factory.mktemp("ours"))
    numbers = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE}
    quiet = {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.0, "cpu": True}
    result = train(TrainingConfig(WORDS, folder, tiny_model, **numbers, **quiet))
    return load_file(f"{folder}/model.safetensors"), result.loss


def test_trainer_learns_the_weights_of_our_loop(tiny_model, ours, tmp_path):
    run = trainer(tiny_model, tmp_path)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert_same(run, ours)


def test_gradient_accumulation_leads_to_the_same_weights(tiny_model, ours, tmp_path):
    """Trainer would sum the losses of a model that claims to divide them by the number of labels."""
    run = trainer(tiny_model, tmp_path, per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2)
    run.train()
    assert_same(run, ours, atol=1e-4)


def test_a_loader_worker_leads_to_the_same_weights(tiny_model, ours, tmp_path):
    run = trainer(tiny_model, tmp_path, dataloader_num_workers=1)
    run.train()
    assert_same(run, ours)


@torch.no_grad()
def mean_iou(model: IFSegForSemanticSegmentation) -> float:
    """Mean IoU in per cent on word maps that training has not seen."""
    config = model.eval().config
    words = len(config.category_ids)
    stream = word_map_stream(words, seed=99, grid_size=config.grid_size, length=64)
    batch = WordMapCollator(config.image_size)(list(stream))
    predictions = [
        resized_argmax(logits, batch["labels"].shape[1:]) for logits in model(word_map=batch["word_map"]).logits
    ]
    pairs = (batch["labels"] * words + torch.stack(predictions)).flatten()
    return 100 * scores(pairs.bincount(minlength=words**2).view(words, words).numpy())["mean_iou"]


def test_trainer_tunes_the_nano_checkpoint_as_our_loop(tmp_path):
    nano, ours = shutil.copytree(NANO, str(tmp_path / "nano")), str(tmp_path / "ours")
    config = json.loads((NANO / "config.json").read_text())
    (tmp_path / "nano" / "config.json").write_text(json.dumps({**config, "image_size": 64}))
    words = ["cat", "dog", "sky", "grass", "road"]
    quiet = {"dropout": 0.0, "drop_path": 0.0, "weight_decay": 0.0, "cpu": True, "mixed_precision": "no"}
    train(TrainingConfig(words, ours, nano, steps=40, batch_size=16, learning_rate=1e-3, **quiet))
    expected = mean_iou(IFSegForSemanticSegmentation.from_pretrained(ours))

    run = trainer(nano, tmp_path / "run", words, max_steps=40, per_device_train_batch_size=16, learning_rate=1e-3)
    before = mean_iou(run.model)
    run.train()
    assert mean_iou(run.model) > before + 10
    assert mean_iou(run.model) == pytest.approx(expected, abs=1)


def test_the_result_runs_in_a_pipeline(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path / "run", categories={"animal": ["cat", "dog"], "sky": ["cloud"]}, dropout=0.1)
    run.train()
    run.save_model(tmp_path / "model")
    pipe = pipeline("image-segmentation", model=str(tmp_path / "model"))
    assert pipe.model.config.id2label == {0: "animal", 1: "sky"}
    assert pipe.model.config.word_categories == [0, 0, 1]
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    assert {segment["label"] for segment in pipe(image)} <= {"animal", "sky"}


def test_evaluation_gets_logits_alone(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path)
    shapes = []

    def metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"accuracy": 0.0}

    run.compute_metrics = metrics
    images = [{"pixel_values": torch.zeros(3, 64, 64), "labels": torch.zeros(64, 64).long()} for _ in range(3)]
    run.data_collator = torch.utils.data.default_collate
    report = run.evaluate(images)
    assert shapes == [((3, 3, 4, 4), (3, 64, 64))]
    assert report["eval_loss"] > 0


def test_a_column_dropped_by_trainer_is_reported(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        run.train()
