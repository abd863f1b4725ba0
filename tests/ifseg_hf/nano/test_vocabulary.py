"""The words of pre-training and their relations."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ifseg_hf.nano.vocabulary import BACKGROUND, Vocabulary


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary()


def accepted(vocabulary: Vocabulary, name: str) -> set[str]:
    return {vocabulary.names[i] for i in vocabulary.accepted[vocabulary.index[name]].nonzero()[0]}


def test_each_name_is_there_once(vocabulary):
    assert 1500 < len(vocabulary) == len(vocabulary.names) == len(vocabulary.index) < 2000
    assert all(vocabulary.names[i] == name for name, i in vocabulary.index.items())
    assert all(name == " ".join(name.split()).lower() for name in vocabulary.names)


def test_each_class_of_imagenet_has_a_name(vocabulary):
    assert vocabulary.classes.shape == vocabulary.things.shape == (1000,)
    names = [vocabulary.names[i] for i in vocabulary.classes]
    assert [names[i] for i in (0, 162, 340, 817)] == ["tench", "beagle", "zebra", "sports car"]
    assert len(set(names)) > 980  # the few that English calls alike, such as two kinds of crane
    assert vocabulary.things[[162, 340, 817]].all()
    assert not vocabulary.things[[970, 978]].any()  # alp, seashore


def test_classes_have_everyday_names(vocabulary):
    everyday = {
        vocabulary.names[i]: vocabulary.names[j]
        for i, j in zip(vocabulary.classes, vocabulary.everyday_classes, strict=True)
    }
    expected = {"beagle": "dog", "ox": "cow", "horse": "horse", "desk": "table"}
    assert {name: everyday[name] for name in expected} == expected
    assert len(set(everyday.values())) < 0.7 * len(everyday)


def test_names_have_one_order_in_every_process():
    code = "from ifseg_hf.nano.vocabulary import Vocabulary; print(*Vocabulary().names, sep='|')"
    orders = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "12"
    }
    assert len(orders) == 1


def test_parents_and_synonyms_hold_for_a_name(vocabulary):
    assert accepted(vocabulary, "beagle") == {"beagle", "dog", "animal"}
    assert accepted(vocabulary, "dog") == {"dog", "animal"}
    assert accepted(vocabulary, "sea") == accepted(vocabulary, "ocean") >= {"sea", "ocean", "water", BACKGROUND}
    assert BACKGROUND in accepted(vocabulary, "sky")
    assert BACKGROUND not in accepted(vocabulary, "dog")


def test_accepted_names_are_reflexive_and_transitive(vocabulary):
    matrix = vocabulary.accepted
    assert matrix.diagonal().all()
    counts = matrix.astype(np.float32)
    assert np.array_equal(counts @ counts > 0, matrix)


def test_related_names_are_accepted_in_either_direction(vocabulary):
    beagle, dog, cat = (vocabulary.index[name] for name in ("beagle", "dog", "cat"))
    assert vocabulary.related[beagle, dog]
    assert vocabulary.related[dog, beagle]
    assert not vocabulary.related[dog, cat]
    assert np.array_equal(vocabulary.related, vocabulary.related.T)


def test_no_name_is_related_to_most_others(vocabulary):
    assert vocabulary.related.sum(1).max() < len(vocabulary) / 3


@pytest.mark.parametrize(
    ("name", "singular"),
    [
        ("bus", "bus"),
        ("buses", "bus"),
        ("dogs", "dog"),
        ("cherries", "cherry"),
        ("children", "child"),
        ("leaves", "leaf"),
        ("traffic lights", "traffic light"),
    ],
)
def test_plurals_are_found(vocabulary, name, singular):
    assert vocabulary.find(name) == vocabulary.index[singular]


def test_labels_are_found_by_their_last_word(vocabulary):
    assert vocabulary.find("african crocodile") is None
    assert vocabulary.find_label("african crocodile") == vocabulary.index["crocodile"]
    assert vocabulary.find_label("wild horses") == vocabulary.index["horse"]


@pytest.mark.parametrize("name", ["nonesuch", "the nonesuch", "madagascar cat"])
def test_unknown_and_misleading_labels_have_no_name(vocabulary, name):
    assert vocabulary.find_label(name) is None


def captioned(vocabulary: Vocabulary, *captions: str, **options) -> set[str]:
    return {vocabulary.names[i] for i in vocabulary.in_captions(captions, **options)}


def test_names_of_captions_need_two_captions(vocabulary):
    captions = "A dog, and a cat!", "Two dogs .", "dog dog ball ball"
    assert captioned(vocabulary, *captions) == {"dog"}
    assert captioned(vocabulary, *captions, minimum=1) == {"dog", "cat", "ball"}


def test_names_of_two_words_hide_those_of_one(vocabulary):
    assert captioned(vocabulary, "a fire truck", minimum=1) == {"fire truck"}
    assert captioned(vocabulary, "a truck on fire", minimum=1) == {"truck", "fire"}


def test_colours_and_views_in_captions_are_no_names(vocabulary):
    assert captioned(vocabulary, "a close view of an orange background", minimum=1) == set()


def test_images_never_get_names_that_are_held_out():
    vocabulary, all_names = Vocabulary(["elephant", "ocean"]), Vocabulary()
    held_out = {name for name, out in zip(vocabulary.names, vocabulary.held_out, strict=True) if out}
    assert {"elephant", "african elephant", "ocean", "sea"} <= held_out  # and what they apply to
    assert "animal" not in held_out
    assert len(held_out) < 10
    assert vocabulary.find("elephants") is None
    assert all_names.find("elephants") is not None
    assert vocabulary.in_captions(["an elephant by a tree", "elephant and tree"]) == [vocabulary.index["tree"]]
    assert not vocabulary.things[386]  # African elephant
    assert all_names.things[386]
    assert not set(vocabulary.used) & set(vocabulary.held_out.nonzero()[0])


def test_an_unknown_name_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"not among the names.*flurb"):
        Vocabulary(["flurb"])
