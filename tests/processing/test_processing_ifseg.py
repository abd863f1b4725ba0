import copy
import json

import numpy as np
import pytest
import torch
from checkpoints import small_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_outputs import token_ids

from ifseg_hf.processing import PROMPT_TEMPLATE, IFSegImageProcessor, IFSegProcessor
from ifseg_hf.processing.prompt_ifseg import PromptEncoder, complete_template, normalize_text

CODE = [
    "dense_crf",
    "image_processing",
    "image_reading",
    "pipeline",
    "post_processing",
    "processing",
    "prompt",
    "segmenter",
    "sliding_window",
    "background",
    "text",
]
QUESTION = "what is the segmentation map of the image? object:"

names = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8)
words = names.filter(normalize_text)
vocabularies = st.lists(words, min_size=1, max_size=4, unique_by=normalize_text)


def random_image(height: int = 80, width: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def roomy(processor: IFSegProcessor) -> IFSegProcessor:
    processor.tokenizer.model_max_length = 1024
    return processor


@pytest.fixture
def processor(small_processor):
    limit = small_processor.tokenizer.model_max_length
    yield roomy(small_processor)
    small_processor.tokenizer.model_max_length = limit


@pytest.mark.parametrize("vocabulary", ["coco_stuff_unseen_15", "ade20k_150", "coco_stuff_171"])
def test_published_vocabularies(published_processor, vocabulary):
    expected = token_ids()[vocabulary]
    words = published_processor.encode_categories(expected["categories"])
    assert words["category_ids"] == expected["category_token_ids"]
    assert words["prompt_ids"] == expected["prompt_input_ids"]
    assert words["id2label"] == dict(enumerate(expected["categories"]))
    inputs = published_processor(categories=expected["categories"], return_tensors="pt")
    assert inputs.input_ids.tolist() == [expected["prompt_input_ids"]]


def test_odd_words(published_processor):
    tokens = token_ids()
    assert f"{QUESTION}{{categories}} unknown" == PROMPT_TEMPLATE
    assert tokens["prompt"].strip() == QUESTION
    encoder = PromptEncoder(published_processor.tokenizer)
    for name, ids in tokens["others"].items():
        assert encoder.tokenize(" ".join(name.split())) == ids
        (found,) = published_processor.encode_categories([name])["category_ids"]
        assert found == encoder.tokenize(normalize_text(name))
        assert found == ids or normalize_text(name) != " ".join(name.split())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vocabularies, st.booleans())
def test_prompt_is_made_of_its_parts(processor, categories, append_unknown):
    tokenizer = processor.tokenizer
    words = processor.encode_categories(categories, append_unknown=append_unknown)
    parts = [QUESTION, *map(normalize_text, categories), *["unknown"] * append_unknown]
    ids = [tokenizer(f" {part}", add_special_tokens=False, split_special_tokens=True)["input_ids"] for part in parts]
    assert words["prompt_ids"] == [0, *sum(ids, []), 2]  # noqa: RUF017
    assert words["category_ids"] == ids[1 : 1 + len(categories)]
    assert (words["word_ids"], words["word_categories"]) == (None, None)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(vocabularies, min_size=1, max_size=4))
def test_lists_of_lists_are_padded(processor, lists):
    inputs = processor(categories=lists, return_tensors="pt")
    rows = [processor.encode_categories(categories) for categories in lists]
    largest = max(map(len, lists))
    assert inputs.category_ids.shape == inputs.category_mask.shape
    assert inputs.category_ids.shape[:2] == (len(lists), largest)
    for index, row in enumerate(rows):
        assert inputs.input_ids[index][inputs.attention_mask[index].bool()].tolist() == row["prompt_ids"]
        for ids, mask, expected in zip(
            inputs.category_ids[index],
            inputs.category_mask[index],
            row["category_ids"] + [[]] * (largest - len(row["category_ids"])),
            strict=True,
        ):
            assert ids[mask.bool()].tolist() == expected
            assert (ids[~mask.bool()] == processor.tokenizer.pad_token_id).all()


def test_white_space_collapses(processor):
    assert processor.encode_categories(["  traffic \n light "])["id2label"] == {0: "traffic light"}
    assert processor.encode_categories(["a b"]) == processor.encode_categories(["a  \t b"])


@pytest.mark.parametrize(
    ("typed", "normalized"),
    [
        ("Sky", "sky"),
        ("wall-concrete", "wall concrete"),
        ("sofa/Couch", "sofa couch"),
        ("*New   York - TAXI!", "new york taxi!"),
        ("the traffic light's pole, left", "the traffic light's pole, left"),
    ],
)
def test_names_are_normalized_but_labels_are_as_typed(processor, typed, normalized):
    assert normalize_text(typed) == normalized
    found, expected = (processor.encode_categories([name]) for name in (typed, normalized))
    assert found["category_ids"] == expected["category_ids"]
    assert found["prompt_ids"] == expected["prompt_ids"]
    assert found["id2label"] == {0: " ".join(typed.split())}
    fine = processor.encode_categories({"Thing": [typed]})
    assert fine["word_ids"] == expected["category_ids"]


def test_prompts_are_normalized_around_the_names(processor):
    typed = processor.encode_categories(["cat"], prompt="?What is IN the picture: {categories}/? Well-Known")
    expected = processor.encode_categories(["cat"], prompt="what is in the picture: {categories} ? well known")
    assert typed["prompt_ids"] == expected["prompt_ids"]
    assert typed["prompt"] == "?What is IN the picture: {categories}/? Well-Known"


@pytest.mark.parametrize(
    "categories", [["sky", "cat", "Sky"], ["wet-grass", "dog", "Wet grass"], {"a": ["sky", "x", "SKY"], "b": ["c"]}]
)
def test_names_that_become_one_are_refused_by_both(processor, categories):
    names = categories["a"] if isinstance(categories, dict) else categories
    message = rf'"{names[0]}" and "{names[2]}" are the same for the model, .* \(numbers 1 and 3 of the'
    with pytest.raises(ValueError, match=message):
        processor.encode_categories(categories)


def test_special_tokens_in_names_are_text(processor):
    words = processor.encode_categories(["</s>", "<pad>"])
    assert not {0, 1, 2, 3} & set(sum(words["category_ids"], []))  # noqa: RUF017


def test_prompts(processor):
    own = processor.encode_categories(["cat"], prompt="  what is \n it? ")
    assert own["prompt"] == "what is it?{categories} unknown"
    assert processor.encode_categories(["cat"])["prompt"] == PROMPT_TEMPLATE
    bare = processor.encode_categories(["cat"], prompt="", append_unknown=False)
    assert bare["prompt_ids"] == [0, *bare["category_ids"][0], 2]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (None, PROMPT_TEMPLATE),
        ("what is it?", "what is it?{categories} unknown"),
        ("what is it?{categories}", "what is it?{categories}"),
        ("which of  {categories} is it?", "which of {categories} is it?"),
        ("", "{categories} unknown"),
        ("{0} {", "{0} {{categories} unknown"),
    ],
)
def test_a_prompt_becomes_a_template(processor, prompt, expected):
    assert complete_template(prompt) == expected
    words = processor.encode_categories(["cat", "dog"], prompt)
    assert words["prompt"] == expected
    assert processor.encode_categories(["cat", "dog"], expected) == words  # complete already
    before, after = expected.split("{categories}")
    parts = [part.strip() for part in (before, "cat", "dog", after) if part.strip()]
    assert words["prompt_ids"] == [
        0,
        *(token for part in parts for token in PromptEncoder(processor.tokenizer).tokenize(part)),
        2,
    ]
    assert processor(categories=["cat", "dog"], prompt=prompt)["input_ids"] == [words["prompt_ids"]]


def test_templates_without_one_placeholder_are_refused(processor):
    for template in ("what is it?", "{categories} or {categories}"):
        with pytest.raises(ValueError, match="exactly once"):
            IFSegProcessor(processor.image_processor, processor.tokenizer, prompt_template=template)
    with pytest.raises(ValueError, match="more than once"):
        processor.encode_categories(["cat"], "{categories} or {categories}")


def test_the_template_is_saved_with_the_processor(processor, tmp_path):
    own = IFSegProcessor(processor.image_processor, processor.tokenizer, "find: {categories} or nothing")
    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["prompt_template"] == own.prompt_template
    loaded = IFSegProcessor.from_pretrained(tmp_path)
    assert loaded.encode_categories(["cat"]) == own.encode_categories(["cat"])
    assert loaded.encode_categories(["cat"], "which?")["prompt"] == "which?{categories} or nothing"
    assert loaded.encode_categories(["cat"])["prompt_ids"] != processor.encode_categories(["cat"])["prompt_ids"]


def test_hierarchical_vocabulary(processor):
    words = processor.encode_categories({"animal": ["cat", "dog"], "wall": ["concrete wall"]})
    assert words["id2label"] == {0: "animal", 1: "wall"}
    assert words["prompt_ids"] == processor.encode_categories(["animal", "wall"])["prompt_ids"]
    assert words["word_ids"] == processor.encode_categories(["cat", "dog", "concrete wall"])["category_ids"]
    assert words["word_categories"] == [0, 0, 1]
    coarse = processor(categories={"animal": ["cat", "dog"], "wall": ["wall"]})
    assert coarse == processor(categories=["animal", "wall"])


def test_words_fit_the_model(processor):
    model = small_model(vocab_size=len(processor.tokenizer)).eval()
    inputs = processor(
        images=[random_image(), random_image(100, 80)], categories=[["cat", "sky"], ["grass"]], return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(**inputs)
        alone = model(**processor(images=random_image(100, 80), categories=["grass"], return_tensors="pt"))
    maps = processor.post_process_semantic_segmentation(outputs, [(80, 100), (100, 80)])
    assert [map.shape for map in maps] == [(80, 100), (100, 80)]
    assert (maps[1] == 0).all()
    assert (outputs.logits[1, :1][:, outputs.patch_mask[1]] - alone.logits[0].flatten(1)).abs().max() < 1e-5

    categories = ["cat", "concrete wall"]
    model.set_words(**processor.encode_categories(categories))
    with torch.no_grad():
        stored = model(**processor(images=random_image(), return_tensors="pt")).logits
        passed = model(**processor(images=random_image(), categories=categories, return_tensors="pt")).logits
    assert torch.equal(stored, passed)
    model.set_words(**processor.encode_categories({"animal": ["cat", "dog"], "wall": ["concrete wall"]}))
    assert model(word_map=torch.tensor([[[0, 1, 2, 2]] * 4])).logits.shape == (1, 2, 4, 4)


def test_images_alone_and_categories_alone(processor):
    assert set(processor(images=random_image())) == {"pixel_values", "pixel_mask"}
    assert set(processor(categories=["cat"])) == {"input_ids", "attention_mask", "category_ids", "category_mask"}
    labelled = processor(
        random_image(), segmentation_maps=np.zeros((80, 100), np.uint8), ignore_index=0, return_tensors="pt"
    )
    assert (labelled.labels == -100).all()
    assert processor(random_image(), images_kwargs={"do_resize": False}, return_tensors="pt").pixel_values.shape[
        2:
    ] == (
        80,
        100,
    )
    assert "category_ids" in processor.model_input_names


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "empty"),
        ({}, "empty"),
        ("cat, dog", "list of words"),
        (["cat", " \t"], "Number 2"),
        (["cat", "dog", "cat"], "numbers 1 and 3"),
        (["traffic light", "traffic  light"], "twice"),
        (["cat", 5], "not a word"),
        ([["cat"], "dog"], "list of words"),
        ([["cat"], []], "empty"),
        ({"animal": []}, 'names of "animal" is empty'),
        ({"animal": ["cat", "dog", "cat"]}, '"cat" is twice among the names of "animal"'),
        ({"animal": "cat"}, "list of words"),
    ],
)
def test_bad_categories(processor, categories, message):
    with pytest.raises(ValueError, match=message):
        processor(categories=categories)


def test_names_without_tokens(processor, monkeypatch):
    monkeypatch.setattr(PromptEncoder, "tokenize", lambda self, text: [7] * len(text.split()) if text != "猫" else [])
    with pytest.raises(ValueError, match='no tokens for the category "猫"'):
        processor.encode_categories(["cat", "猫"])
    monkeypatch.setattr(PromptEncoder, "tokenize", lambda self, text: [3] if text == "xyz" else [5])
    with pytest.raises(ValueError, match="xyz"):
        processor.encode_categories(["xyz"])


def test_prompt_longer_than_the_positions(small_processor):
    start = small_processor.encode_categories(["cat"])
    cat = len(start["category_ids"][0])
    many = [f"cat {index}" for index in range(40)]
    lengths = [len(ids) for ids in (PromptEncoder(small_processor.tokenizer).tokenize(name) for name in many)]
    room, fitting = 64 - (len(start["prompt_ids"]) - cat), 0
    while sum(lengths[: fitting + 1]) <= room:
        fitting += 1
    encoded, shorter = (small_processor.encode_categories(names) for names in (many, many[:fitting]))
    assert encoded["prompt_ids"] == shorter["prompt_ids"]
    assert len(encoded["prompt_ids"]) <= 64
    assert len(encoded["category_ids"]) == 40
    with pytest.raises(ValueError, match=r"with its first category has \d+ tokens, but the model has 64 positions"):
        small_processor.encode_categories(["cat " * 60])


def test_a_tokenizer_without_a_limit_gets_ofas(processor):
    processor.tokenizer.model_max_length = int(1e30)
    prompt = processor.encode_categories([f"number {index}" for index in range(1000)])["prompt_ids"]
    assert 1000 < len(prompt) <= 1024


def test_mismatched_inputs(processor):
    with pytest.raises(ValueError, match="2 lists of categories for 1 images"):
        processor(images=random_image(), categories=[["cat"], ["dog"]])
    with pytest.raises(ValueError, match="nothing to process"):
        processor()
    with pytest.raises(ValueError, match="no images for segmentation_maps"):
        processor(categories=["cat"], segmentation_maps=np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="no images for catgories"):
        processor(catgories=["cat"], categories=["cat"])


def test_a_tokenizer_without_special_tokens_is_refused(small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad"):
        IFSegProcessor(IFSegImageProcessor(), tokenizer).encode_categories(["cat"])


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = IFSegProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded.image_processor, IFSegImageProcessor)
    assert loaded.tokenizer.model_max_length == 1024
    expected = processor(images=random_image(), categories=["cat", "concrete wall"], return_tensors="pt")
    actual = loaded(images=random_image(), categories=["cat", "concrete wall"], return_tensors="pt")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert files == {f"{stem}_ifseg.py" for stem in CODE}
