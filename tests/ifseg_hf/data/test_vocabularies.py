"""Categories from text, files and mappings, and the embedded vocabularies."""

import json

import pytest
from reference_outputs import PARITY
from tiny_model import save_tiny_model

from ifseg_hf.data.vocabularies import VOCABULARIES, join_names, read_background, read_categories
from ifseg_hf.processing import IFSegProcessor


@pytest.mark.parametrize(
    ("name", "key"),
    [("coco-stuff", "coco_stuff_171"), ("coco-stuff-unseen", "coco_stuff_unseen_15"), ("ade20k", "ade20k_150")],
)
def test_embedded_vocabularies_are_the_published_words_in_order(name, key):
    expected = json.loads((PARITY / "golden" / "tokens.json").read_text(encoding="utf-8"))[key]["categories"]
    assert read_categories(name) == expected


def test_coarse_categories_of_coco_stuff_are_those_of_table_15():
    """In which three fine names belong to two categories each."""
    coarse = read_categories("coco-stuff-coarse")
    assert len(coarse) == 27
    assert sum(map(len, coarse.values())) == 174
    assert coarse["person"] == ["man", "woman", "child", "boy", "girl"]
    assert list(coarse)[9:11] == ["furniture (things)", "food (things)"]
    both = set(coarse["furniture (things)"]) & set(coarse["furniture (stuff)"])
    assert both == {"door", "desk", "mirror"}
    assert len({name for names in coarse.values() for name in names}) == 174 - 3


def test_the_hierarchy_of_ade20k_has_synonyms_of_its_150_categories(tmp_path):
    hierarchy, names = read_categories("ade20k-hierarchy"), read_categories("ade20k")
    assert list(hierarchy) == names
    assert all(fine[0] == name for name, fine in hierarchy.items())
    assert hierarchy["sofa"] == ["sofa", "couch", "lounge"]
    synonyms = [name for fine in hierarchy.values() for name in fine[1:]]
    assert len(synonyms) == 177
    assert not set(synonyms) & set(names)
    assert [name for name in set(synonyms) if synonyms.count(name) > 1] == ["ground"]
    # Every synonym has different tokens. A name that two categories share is a word of each.
    processor = IFSegProcessor.from_pretrained(save_tiny_model(tmp_path))
    processor.tokenizer.model_max_length = 4096
    words = processor.encode_categories(hierarchy)
    assert len(words["word_ids"]) == len(words["word_categories"]) == 150 + 177
    assert words["category_ids"] == processor.encode_categories(names)["category_ids"]


def test_a_fine_name_of_two_categories_is_two_words(tmp_path):
    processor = IFSegProcessor.from_pretrained(save_tiny_model(tmp_path))
    words = processor.encode_categories({"thing": ["door", "bed"], "stuff": ["door"]})
    assert words["word_categories"] == [0, 0, 1]
    assert words["word_ids"][0] == words["word_ids"][2]


def test_categories_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "words.txt").write_text("cat\n traffic  light \n\ncup\n")
    (tmp_path / "words").write_text("cat\ntraffic light\ncup\n")
    (tmp_path / "flat.yaml").write_text("- cat\n- traffic light\n- cup\n")
    (tmp_path / "coarse.yml").write_text("animal: [cat, dog]\nsky: [cloud]\n")
    (tmp_path / "coarse.json").write_text('{"animal": ["cat", "dog"], "sky": ["cloud"]}')
    flat, coarse = ["cat", "traffic light", "cup"], {"animal": ["cat", "dog"], "sky": ["cloud"]}
    for text in ["cat,traffic  light , cup", tmp_path / "words.txt", tmp_path / "words", tmp_path / "flat.yaml"]:
        assert read_categories(str(text)) == flat
    assert read_categories(str(tmp_path / "coarse.yml")) == coarse
    assert read_categories(str(tmp_path / "coarse.json")) == coarse
    assert read_categories(flat) == flat
    assert read_categories(coarse) == coarse


def test_a_vocabulary_takes_precedence_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ade20k").write_text("cat\ncup")
    assert len(read_categories("ade20k")) == 150
    assert read_categories("./ade20k") == ["cat", "cup"]


@pytest.mark.parametrize("text", ["coco_stuff", "cocostuff-coarse", "ade20"])
def test_a_misspelt_vocabulary_is_refused(text):
    with pytest.raises(ValueError, match="There is no vocabulary"):
        read_categories(text)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "There is no category"),
        (["cat", 5], "5 is not a name"),
        ({"animal": "cat"}, "needs a list"),
        ({"animal": ["cat", "cat"]}, '"cat" is given twice'),
    ],
)
def test_errors_name_wrong_categories(categories, message):
    with pytest.raises(ValueError, match=message):
        read_categories(categories)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('"mug, cup", cat', ["mug, cup", "cat"]),
        ('cat , "a ""b"", c" , dog', ["cat", 'a "b", c', "dog"]),
        ('19" rack, cat', ['19" rack', "cat"]),
    ],
)
def test_a_name_with_a_comma_stands_in_quotes(text, names):
    assert read_categories(text) == names
    assert read_categories(join_names(names)) == names


@pytest.mark.parametrize(("text", "message"), [('"mug, cup', "two quotation marks"), ("cat, a\udc80", "save its file")])
def test_text_that_is_no_list_of_names_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_categories(text)


def test_names_of_the_vocabularies():
    assert list(VOCABULARIES) == ["ade20k-hierarchy", "ade20k", "coco-stuff-coarse", "coco-stuff-unseen", "coco-stuff"]


def test_background_words_are_read_like_categories(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("sky\nwall, painted\n")
    assert read_background(None) is None
    assert (read_background("default"), read_background("none"), read_background([])) == ("default", "none", "none")
    assert read_background(str(file)) == read_background('sky, "wall, painted"') == ["sky", "wall, painted"]
    assert read_background(("sky", "sea")) == ["sky", "sea"]
    with pytest.raises(ValueError, match="give a list of words"):
        read_background("coco-stuff-coarse")
