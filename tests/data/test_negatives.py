"""Negatives: prompts of what is not in an image."""

import numpy as np
import pytest
import torch

from vlsm.data.describe import ATTRIBUTES
from vlsm.data.negatives import (
    ABSENT_SETS,
    Negatives,
    absent_prompts,
    add_empty_masks,
    in_place_of_class,
    unused_words,
)
from vlsm.data.records import Record, choose_prompt, mark_absent
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.weights import MINI

PROMPT = "one medium white round polyp, located in right of the image"


def record(name, word, *texts):
    prompts = {f"p{k}": text for k, text in enumerate(["", word, *texts])}
    return Record(f"{name}.png", f"{word}/{name}.png", f"{name}.png", None, prompts, word)


@pytest.fixture
def records():
    rows = [record("a", "polyp", PROMPT), record("a", "tool"), record("b", "tool", "a grey tool")]
    return mark_absent([*rows, record("c", "polyp", "pink polyp")])


def test_absent_classes(records):
    assert [row.absent for row in records] == [(), (), ("polyp",), ("tool",)]


def test_absent_classes_of_one_image_under_two_names_and_in_two_cases():
    rows = [record("a", "Polyp"), record("b", "polyp"), record("b", "tool")]
    rows[2].name = "b.jpg"
    assert [row.absent for row in mark_absent(rows)] == [("tool",), (), ()]


def test_words_of_folders_names_count_as_words():
    left = unused_words(["foot", "ulcer", "ulcers", "lung", "bones"], [record("a", "foot_ulcer", "lungs")])
    left += unused_words(
        ["foot", "ulcer", "ulcers", "lung", "bones"], [record("a", "foot_ulcer")], ["lungs"], True
    )
    assert left == ["bones"]


def test_words_are_split_once_and_for_all(records):
    vocabulary = Tokenizer(MINI, 77).words()
    train, held_out = (unused_words(vocabulary, records, held_out=flag) for flag in (False, True))
    assert not set(train) & set(held_out) and 0.1 < len(held_out) / len(train) < 0.4
    used = set(vocabulary) - set(train) - set(held_out)
    texts = {"one", "medium", "white", "round", "polyp", "polyps", "located", "the", "right", "image", "pink"}
    attributes = {word for word in vocabulary if ATTRIBUTES & {word, word.removesuffix("s")}}
    assert used == texts | attributes, "colours and places may well be there"
    fewer = unused_words(vocabulary, [*records, record("d", train[0] + "s")], [f"a thin {train[1]}"])
    assert fewer == train[2:], "the words of further prompts are left out, and no other changes its part"


@pytest.mark.parametrize(
    "word, prompt, expected",
    [
        ("polyp", PROMPT, PROMPT.replace("polyp", "artery")),
        ("polyp", "Polyp and polyp", "artery and artery"),
        ("foot ulcer", "a foot ulcer on the skin", "a artery on the skin"),
        ("polyp", "two polyps at the left", "two artery at the left"),
        ("polyp", "polyposis", "artery"),
        ("polyp", "a growth on the wall", "artery"),
        ("polyp", "", "artery"),
        (None, "a polyp.", "a artery."),
        (None, "", "artery"),
        ("a+b", "one a+b", "one artery"),
    ],
)
def test_a_word_takes_the_place_of_the_class(word, prompt, expected):
    assert in_place_of_class(Record("", "", None, None, class_word=word), prompt, "artery") == expected


def test_negatives_name_what_is_not_there(records):
    negatives = Negatives(records, "random", ["bone", "artery"], count=2)
    drawn = []
    for epoch in range(200):
        texts = negatives.beside(["right"] * 4, range(4), 42, epoch)
        assert texts[::3] == ["right"] * 4 and len(texts) == 12
        drawn.append(texts)
    assert drawn[7] == negatives.beside(["right"] * 4, range(4), 42, 7), "equal seeds draw equal ones"
    assert drawn[7] != drawn[8] and drawn[7] != negatives.beside(["right"] * 4, range(4), 43, 7)
    of = [[texts[k] for texts in drawn for k in (3 * i + 1, 3 * i + 2)] for i in range(4)]
    assert set(of[0]) == {"bone", "artery"} == set(of[1]), "nothing of the data set is absent there"
    polyp = [text for text in of[2] if "polyp" in text]
    assert (
        set(polyp) <= {"polyp", PROMPT, "pink polyp"}
        and len(set(polyp)) == 2
        and 0.4 < len(polyp) / len(of[2]) < 0.6
    )
    assert not any("polyp" in text for text in of[3]) and any("tool" in text for text in of[3])


def test_the_word_does_not_depend_on_the_prompt_that_was_chosen():
    texts = {f"p{k}": f"polyp {k}" for k in range(10)}
    one = Record("a", "a", None, None, texts, "polyp")
    words = [f"w{k}" for k in range(10)]
    negatives = Negatives([one], "random", words)
    pairs = set()
    for epoch in range(1500):
        prompt = choose_prompt(one, "random", 42, epoch, 0)
        pairs.add((prompt, negatives.beside([prompt], [0], 42, epoch)[1]))
    assert len({(prompt, word) for prompt, word in pairs if word in words}) == 9 * 10


def test_some_stand_in_the_right_prompt(records):
    negatives = Negatives(records[:1], "random", ["bone"])
    texts = [negatives.beside([PROMPT], [0], epoch)[1] for epoch in range(400)]
    share = np.mean([text == PROMPT.replace("polyp", "bone") for text in texts])
    assert 0.18 < share < 0.32 and texts.count("bone") == 400 * (1 - share)


def test_one_text_for_all_classes_is_no_negative(records):
    texts = []
    negatives = Negatives(records, "a polyp", ["bone"])
    for epoch in range(40):
        texts += negatives.beside(["a polyp"] * 4, range(4), epoch)[1::2]
    assert set(texts) == {"bone", "a bone", "polyp", "tool"}


def test_none_are_asked_for(records):
    negatives = Negatives(records, "random", [], 0)
    masks = torch.randint(0, 2, (4, 1, 5, 5)).byte()
    assert negatives.beside(["x"] * 4, range(4), 1) == ["x"] * 4
    assert torch.equal(add_empty_masks(masks, 0), masks)


def test_empty_masks_keep_ignored_pixels():
    masks = torch.tensor([0, 1, 255]).byte().expand(2, 1, 4, 3).clone()
    masks[1, :, 0] = 1
    both = add_empty_masks(masks, 2)
    assert both.shape == (6, 1, 4, 3) and torch.equal(both[::3], masks)
    for k in (1, 2):
        assert torch.equal(both[k::3] == 255, masks == 255) and not (both[k::3] == 1).any()


def test_prompts_that_evaluation_asks_for(records):
    right = ["pink polyp", "a tool", "grey tool", "small polyp"]
    prompts = absent_prompts(records, right, ["bone"])
    assert list(prompts) == list(ABSENT_SETS)
    classes, words, in_prompt = prompts.values()
    assert classes[:2] == [None, None] and classes[2] in right[::3] and classes[3] in right[1:3]
    assert set(absent_prompts(records, right, [])["absent word"]) == {None}, "where no word is left"
    assert words == ["bone"] * 4 and in_prompt == ["pink bone", "a bone", "grey bone", "small bone"]
