"""Pre-training of the nano OFA: the phases of the recipe and the run.

Stage 1, `train_trunk`: classification of named boxes by pooled features. Stage 2, `train_vision_language`: captions,
text infilling and alignment through `OFAForConditionalGeneration`. Both train on scenes (`ifseg_hf.nano.scenes`):
images, names and boxes. Segmentation masks are never a target.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from tqdm.auto import tqdm
from transformers import BartTokenizer

from ifseg_hf.modeling.modeling_ofa import OFAForConditionalGeneration
from ifseg_hf.nano.batches import Phase
from ifseg_hf.nano.configuration import nano_config
from ifseg_hf.nano.scenes import HELD_OUT, SceneMaker, load_named_images, load_streets
from ifseg_hf.nano.stages import processes
from ifseg_hf.nano.texts import train_tokenizer
from ifseg_hf.nano.trunk import calibrate, train_trunk
from ifseg_hf.nano.vision_language import train_vision_language
from ifseg_hf.pretrained import resolve_model
from ifseg_hf.processing.image_processing_ifseg import IFSegImageProcessor
from ifseg_hf.processing.processing_ifseg import IFSegProcessor
from ifseg_hf.training.batch_norm import freeze_batch_norm, train_batch_norm

TRUNK_PHASES = [Phase(2400, 128, 64, single=True), Phase(2600, 48, 128), Phase(2000, 48, (128, 192))]
CALIBRATION = Phase(60, 48, (128, 192, 256))
LANGUAGE_PHASES = [
    Phase(200, 48, 128, train_trunk=False),
    Phase(1400, 48, (128, 192, 256)),
    Phase(6000, 48, (128, 128, 192, 256), train_norms=True, language_every=4),
    Phase(800, 48, (128, 128, 192, 256), language_every=2),
]
SECOND_LANGUAGE_PHASES = [
    Phase(3100, 64, (96, 128, 96, 128, 256), train_norms=True, language_every=4),
    Phase(400, 64, (96, 128, 192, 256), language_every=2),
]
_PATCHES = Phase(0, 56, (96, 128, 128, 192), train_norms=True, language_every=0)
_PATCHES = replace(_PATCHES, whole_image_share=0.55, whole_image_sizes=(64, 96, 128))
PATCH_PHASES = [replace(_PATCHES, steps=6700), replace(_PATCHES, steps=400, train_norms=False)]
SECOND_PATCH_PHASES = [replace(_PATCHES, steps=15200), replace(_PATCHES, steps=800, train_norms=False)]
THIRD_PATCH_PHASES = [
    replace(_PATCHES, steps=9500, batch=64),
    replace(_PATCHES, steps=500, batch=64, train_norms=False),
]
TRANSFORMER_PHASES = [Phase(900, 48, (128, 96, 128, 192), train_trunk=False)]
SCENE_PHASES = [
    Phase(900, 40, (128, 192, 256), train_norms=True, language_every=4),
    Phase(100, 40, (128, 192, 256), language_every=2),
]
SECOND_SCENE_PHASES = [
    Phase(500, 48, (128, 96, 128, 192), train_trunk=False),
    Phase(1900, 40, (128, 192, 256), train_norms=True),
    Phase(150, 40, (128, 192, 256)),
]
_COMBINED = replace(_PATCHES, language_every=4, whole_image_share=0.45)
COMBINED_PHASES = [replace(_COMBINED, steps=1500), replace(_COMBINED, steps=120, train_norms=False)]
_TRANSFORMER = Phase(
    500, 32, (128, 96, 128, 192), train_trunk=False, whole_image_share=0.3, whole_image_sizes=(96, 128)
)
# Sizes that distort images as strongly as mosaics do.
_DISTORTED = (64, 96, 128, 128, (48, 128), (128, 48), (80, 128), (128, 80), (64, 96), (96, 64))
_DISTORTED_COMBINED = replace(_PATCHES, language_every=4, whole_image_sizes=_DISTORTED)
FOURTH_PATCH_PHASES = [
    replace(_DISTORTED_COMBINED, steps=11200),
    replace(_DISTORTED_COMBINED, steps=500, train_norms=False),
]
SECOND_TRANSFORMER_PHASES = [_TRANSFORMER]
THIRD_TRANSFORMER_PHASES = [replace(_TRANSFORMER, steps=700, batch=48)]
AVERAGE_CALIBRATION = Phase(15, 32, (128, 128, 192))


def average_weights(model: nn.Module, other: dict[str, torch.Tensor]) -> None:
    """Replaces the weights of `model` by their mean with `other`, the state of a model of the same class.

    Statistics of batch norms have to be measured again afterwards.
    """
    model.load_state_dict({name: (value + other[name]) / 2 for name, value in model.state_dict().items()})


def save_pretrained_model(model: OFAForConditionalGeneration, tokenizer: BartTokenizer, folder: str | Path) -> None:
    """Saves the model in float16 with its processor, for images and word maps of three quarters of `image_size`.

    Tuning on words first has to learn the position of each patch, which takes minutes for this smaller number of
    patches. Word maps have the same grid as images: after tuning on a coarser grid, the model would confuse the patches
    between the learnt positions with their neighbours.
    """
    size = model.config.image_size * 3 // 4
    image_processor = IFSegImageProcessor(size={"shortest_edge": size, "longest_edge": 4 * size})
    # Saves a copy, because `model` itself must stay in float32 and channels last.
    config = copy.deepcopy(model.config)
    config.image_size = size
    small = OFAForConditionalGeneration(config)
    small.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
    small.half().save_pretrained(folder)
    IFSegProcessor(image_processor, tokenizer).save_pretrained(folder)


@dataclass
class Pretraining:
    """The data, names and model of a run.

    Each stage writes its state to `output_dir/stages`; a run that was stopped resumes from there. Raises `ImportError`
    with a torch older than 2.9.

    Args:
        images, street: folders of named images and of street images (or `None`).
        output_dir: folder for the checkpoint.
        scale: multiplies the steps of every phase.
        model: an earlier checkpoint of this recipe to start from; it must have the same names.
    """

    images: str | Path
    street: str | Path | None
    output_dir: str | Path
    scale: float = 1.0
    model: str | Path | None = None

    def __post_init__(self):
        if not hasattr(torch.optim, "Muon"):  # checked now, because Muon is first used after hours of training
            raise ImportError(f"Pre-training needs torch 2.9 or later, for Muon; this is {torch.__version__}.")
        self.stages = Path(self.output_dir) / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)
        images = load_named_images(self.images, self.stages)
        count = len(images) - min(HELD_OUT, len(images) // 10)
        self.held_out = images.part(slice(count, len(images)))
        streets = load_streets(self.street, "train") if self.street else None
        self.maker = SceneMaker(images.part(slice(0, count)), streets)
        self.tokenizer = train_tokenizer(self.maker.names)
        self.config = nano_config(len(self.tokenizer))

    def scaled(self, phases: list[Phase]) -> list[Phase]:
        """The phases with `scale` times their steps, at least one."""
        return [replace(phase, steps=max(1, round(phase.steps * self.scale))) for phase in phases]

    def start(self) -> OFAForConditionalGeneration:
        """The model that training starts from: random weights, or `model`."""
        torch.manual_seed(0)
        model = OFAForConditionalGeneration(self.config)
        if self.model is not None:
            folder = resolve_model(self.model)
            if IFSegProcessor.from_pretrained(folder).tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(
                    f'"{self.model}" was trained with other names: its tokenizer differs from the tokenizer of these '
                    "images. Give a checkpoint with the same names, or none."
                )
            earlier = OFAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            model.load_state_dict(earlier.state_dict())
        return model

    def average_with(self, model: OFAForConditionalGeneration, before: dict[str, torch.Tensor]) -> None:
        """[`average_weights`] with the state `before`, and new statistics of the batch norms."""
        average_weights(model, before)
        trunk = train_batch_norm(model.model.encoder.embed_images)
        calibrate(trunk, self.maker, self.scaled([AVERAGE_CALIBRATION])[0], seed=5)
        freeze_batch_norm(trunk)

    def run(self, log=print) -> None:
        """Both stages, in each of the processes that train together."""
        model = self.start()
        self.run_trunk(model, log)
        self.run_vision_language(model, log)
        if processes()[0] == 0:
            save_pretrained_model(model, self.tokenizer, self.output_dir)

    def run_trunk(self, model: OFAForConditionalGeneration, log=print) -> None:
        """Stage 1: trains the trunk and loads it into the model."""
        trunk, file = model.model.encoder.embed_images, self.stages / "trunk_state.pt"
        if not file.exists():
            calibration, start = self.scaled([CALIBRATION])[0], trunk.state_dict() if self.model else None
            phases, output = self.scaled(TRUNK_PHASES), self.stages / "trunk.pt"
            state = train_trunk(self.maker, self.held_out, self.config, phases, output, calibration, start, log=log)
            if processes()[0] == 0:
                torch.save(state, file)
        if distributed.is_initialized():
            distributed.barrier()
        trunk.load_state_dict(torch.load(file, weights_only=True))

    def run_vision_language(self, model: OFAForConditionalGeneration, log=print) -> None:
        """Stage 2, in several rounds."""
        self.maker.antialias = False  # the image processor resizes without antialiasing
        self.maker.crop = 0.6

        def run(phases: list[Phase], name: str, **settings) -> None:
            train(self.scaled(phases), self.stages / name, **settings)

        train = partial(train_vision_language, self.maker, model, self.tokenizer, log=log)
        run(LANGUAGE_PHASES, "language.pt")
        run(SECOND_LANGUAGE_PHASES, "language_2.pt", learning_rate=6e-4, trunk_learning_rate=4e-4, seed=2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run(PATCH_PHASES, "patches.pt", trunk_learning_rate=1e-3, seed=3)
        run(TRANSFORMER_PHASES, "patches_in_words.pt", learning_rate=6e-4, seed=4)
        # The patch loss also gives the object's name to the patches around it. The mean of the weights before and after
        # has sharp outlines and keeps most of the gain. In the second round, the scenes sharpen the outlines.
        self.average_with(model, before)
        run(SECOND_PATCH_PHASES, "patches_2.pt", trunk_learning_rate=1e-3, seed=31)
        run(TRANSFORMER_PHASES, "patches_2_in_words.pt", learning_rate=6e-4, seed=41)
        self.maker.street_share = 0.25
        run(SCENE_PHASES, "scenes.pt", learning_rate=4e-4, trunk_learning_rate=4e-4, warmup=50, seed=51)
        run(THIRD_PATCH_PHASES, "patches_3.pt", trunk_learning_rate=1e-3, muon=True, seed=61)
        # The transformer needs a longer round to use the patches of the changed trunk.
        run(SECOND_SCENE_PHASES, "scenes_2.pt", learning_rate=8e-4, trunk_learning_rate=4e-4, seed=71)
        # Scenes lower the accuracy of patches; training on both restores it, and trains the transformer.
        settings = {"learning_rate": 4e-4, "trunk_learning_rate": 5e-4, "muon": True, "warmup": 50, "seed": 81}
        run(COMBINED_PHASES, "settling.pt", **settings)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run(SECOND_TRANSFORMER_PHASES, "settled_in_words.pt", learning_rate=6e-4, seed=5)
        run(FOURTH_PATCH_PHASES, "patches_4.pt", learning_rate=6e-4, trunk_learning_rate=1e-3, muon=True, seed=91)
        run(THIRD_TRANSFORMER_PHASES, "patches_4_in_words.pt", learning_rate=6e-4, seed=95)
        self.average_with(model, before)


def _process(rank: int, world: int, arguments: tuple, rendezvous: str) -> None:
    """One of the processes that train together; `arguments` are those of [`Pretraining`]."""
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    torch.set_num_threads(1)
    Pretraining(*arguments).run(tqdm.write)
    distributed.destroy_process_group()


def pretrain(
    images: str | Path,
    street: str | Path | None,
    output_dir: str | Path,
    scale: float = 1.0,
    model: str | Path | None = None,
    workers: int = 1,
    log=tqdm.write,
) -> Path:
    """Runs both stages, see [`Pretraining`]; returns `output_dir`, which then holds the checkpoint.

    `workers` processes of one thread each train together. On a CPU this is faster than one process with as many
    threads, which wait for one another at every layer.
    """
    arguments = (images, street, output_dir, scale, model)
    run = Pretraining(*arguments)  # decodes the images before the other processes start
    if workers == 1:
        run.run(log)
    else:
        rendezvous = run.stages.resolve() / "rendezvous"
        rendezvous.unlink(missing_ok=True)
        multiprocessing.spawn(_process, (workers, arguments, rendezvous.as_uri()), nprocs=workers)
    return Path(output_dir)
