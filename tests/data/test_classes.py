"""Classes of a user's own folder: label maps with dataset.json, a folder for each class, the ignore label."""

import json

import numpy as np
import pytest
from PIL import Image

import datasets
from vlsm.data import images
from vlsm.data.cache import open_split
from vlsm.data.images import ImageError, LabelMask, read_labels, read_mask, read_target
from vlsm.data.records import choose_prompt
from vlsm.data.resize import resize_mask

LABELS = {"background": 0, "liver": 1, "tumour": 2, "ignore": 255}


def label_map(i, shape=(40, 50)):
    """A map that always holds the liver, the tumour in odd images, and a strip that does not count."""
    numbers = np.zeros(shape, np.uint8)
    numbers[:12, :15] = 1
    if i % 2:
        numbers[20:31, 18 + i % 5 : 33] = 2
    numbers[-3:] = 255
    return numbers


def write(root, n, save, first=0, shape=(40, 50)):
    """n images below root/images, and what `save(path below masks/, i)` writes."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    for i in range(first, first + n):
        Image.fromarray(rng.integers(0, 255, (*shape, 3)).astype(np.uint8)).save(root / f"images/{i:02}.png")
        save(root / "masks", i)


def save_map(folder, i, mode="L"):
    folder.mkdir(exist_ok=True)
    numbers = label_map(i)
    picture = Image.fromarray(numbers.astype(np.uint16) if mode == "I;16" else numbers)
    if mode == "P":
        picture.putpalette([(37 * k) % 256 for k in range(768)])
    picture.save(folder / f"{i:02}.png")


def name_labels(root, labels=LABELS, **more):
    (root / "dataset.json").write_text(json.dumps(dict(labels=labels, channel_names={"0": "CT"}, **more)))


@pytest.fixture
def maps(tmp_path):
    write(tmp_path / "maps", 24, save_map)
    name_labels(tmp_path / "maps", prompts={"liver": ["liver", "the liver on a CT slice"]})
    return tmp_path / "maps"


def all_records(root):
    return [record for split in datasets.SPLITS for record in datasets.records(str(root), split)]


def test_each_present_class_of_a_label_map_is_a_record(maps):
    rows = all_records(maps)
    assert len(rows) == 24 + 12 and [row.class_word for row in rows].count("tumour") == 12
    for row in rows:
        i = int(row.name[:2])
        assert row.mask == LabelMask(maps / "masks" / row.name, LABELS[row.class_word], 255)
        assert row.absent == (() if i % 2 else ("tumour",))
        assert row.mask_name == f"{row.class_word}/{row.name}"
        assert row.files == [maps / "images" / row.name, maps / "masks" / row.name]
    liver, tumour = (next(row for row in rows if row.class_word == word) for word in ("liver", "tumour"))
    assert tumour.prompts == {"p0": "", "p1": "tumour"}
    assert {choose_prompt(liver, "random", k) for k in range(20)} == {"liver", "the liver on a CT slice"}
    assert choose_prompt(liver, "class") == "liver" and choose_prompt(tumour, "p1") == "tumour"
    places = {split: {r.name for r in datasets.records(str(maps), split)} for split in datasets.SPLITS}
    assert sum(map(len, places.values())) == 24, "the classes of an image stay in one split"


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_targets_of_a_label_map(mode, tmp_path):
    save_map(tmp_path / "m", 1, mode)
    file, numbers = tmp_path / "m/01.png", label_map(1)
    assert (read_labels(file) == numbers).all()
    for source in (file, numbers):
        target = read_target(LabelMask(source, 2, 255))
        assert target.dtype == np.uint8 and (target == np.where(numbers == 255, 255, numbers == 2)).all()
        assert (read_target(LabelMask(source, 2)) == (numbers == 2)).all()
        assert (read_mask(LabelMask(source, 2, 255)) == (numbers == 2)).all()
    Image.fromarray((numbers == 1).astype(np.uint8) * 255).save(file)
    assert (read_target(file) == (numbers == 1)).all() and read_target(file).dtype == np.uint8


def test_deep_numbers_and_colours_of_label_maps(tmp_path):
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(tmp_path / "deep.png")
    assert read_target(LabelMask(tmp_path / "deep.png", 300)).tolist() == [[0, 1]]
    Image.new("RGB", (3, 3)).save(tmp_path / "colour.png")
    with pytest.raises(ImageError, match="class numbers"):
        read_target(LabelMask(tmp_path / "colour.png", 1))


def test_a_label_map_is_decoded_once_and_cached_as_0_1_255(maps, tmp_path, monkeypatch):
    records = datasets.records(str(maps), "train")
    opened = []
    open_image = images.open_image
    count = lambda source, name=None: opened.append(source) or open_image(source)  # noqa: E731
    monkeypatch.setattr(images, "open_image", count)
    data = open_split(records, 32, tmp_path / "cache", "x")
    n_images = len({record.name for record in records})
    assert len(data) == len(records) > n_images == len(data.images)
    assert len(opened) == 2 * n_images, "each image and each map once"
    for record, mask in zip(records, data.masks):
        assert (mask == resize_mask(read_target(record.mask), 32)).all()
    assert set(np.unique(data.masks)) == {0, 1, 255}
    opened.clear()
    again = open_split(records, 32, tmp_path / "cache", "x")
    assert (again.masks == data.masks).all() and not opened
    for record in records:
        record.mask = LabelMask(record.mask.file, record.mask.value)
    assert set(np.unique(open_split(records, 32, tmp_path / "cache", "x").masks)) == {0, 1}


def test_label_maps_in_split_folders(tmp_path):
    root = tmp_path / "mine"
    for k, split in enumerate(("train", "val", "test")):
        write(root / split, 4, save_map, 10 * k)
    name_labels(root)
    assert [len(datasets.records(str(root), split)) for split in datasets.SPLITS] == [6, 6, 6]
    name_labels(root / "test", {"background": 0, "organ": 1, "growth": 2, "void": 255})
    assert {row.class_word for row in datasets.records(str(root), "test")} == {"organ", "growth", "void"}
    assert {row.class_word for row in datasets.records(str(root), "val")} == {"liver", "tumour"}


@pytest.mark.parametrize(
    "labels, more, message",
    [
        ({"0": "background", "1": "liver"}, {}, "labels.0.*class number"),
        (dict(LABELS, organs=[1, 2]), {}, "labels.organs.*class number"),
        (dict(LABELS, far=70000), {}, "labels.far.*65535"),
        (dict(LABELS, twin=2), {}, "labels.*one number to two"),
        ({"liver": 1, "tumour": 2}, {}, 'labels.*"background": 0'),
        ({"background": 0, "ignore": 255}, {}, "labels.*no class"),
        ({"background": 0, "liver": 1, "tumour": 2}, {}, "labels.*number 255.*masks/.*png.*ignore"),
        (dict(LABELS, bone=7), {}, "labels.*bone.*no map holds"),
        ({**LABELS, "../x": 3}, {}, "labels.*../x"),
        (LABELS, {"prompts": {"bone": "a bone"}}, "prompts.*bone.*labels"),
        (LABELS, {"prompts": {"liver": 3}}, "prompt 'liver'"),
        (LABELS, {"prompts": ["liver"]}, "prompts.*object"),
        ([], {}, "labels.*object"),
    ],
)
def test_a_wrong_dataset_json_is_named_with_its_key(maps, labels, more, message):
    name_labels(maps, labels, **more)
    with pytest.raises(ValueError, match=f"dataset.json'.*{message}"):
        datasets.open_dataset(str(maps), ["train"], 32)


def test_a_label_map_without_dataset_json_is_told_its_form(maps):
    (maps / "dataset.json").unlink()
    with pytest.raises(ValueError, match='dataset.json.*"labels": {"background": 0'):
        datasets.open_dataset(str(maps), ["train"], 32, prompts="a liver")


def test_a_map_that_cannot_be_read_costs_its_own_records(maps):
    (maps / "masks/00.png").write_bytes(b"")
    with pytest.raises(ValueError, match="an empty file"):
        datasets.open_dataset(str(maps), datasets.SPLITS, 32)
    data = datasets.open_dataset(str(maps), datasets.SPLITS, 32, skip_bad=True)
    assert sum(map(len, data.values())) == 23 + 12


def save_classes(folder, i):
    """Overlapping masks of polyp and tool; the tool's is empty in every third image, missing in every fifth."""
    numbers = label_map(1)
    for word, mask in (("polyp", numbers == 1), ("tool", (numbers > 0) & (i % 3 > 0))):
        if word == "polyp" or i % 5:
            (folder / word).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / word / f"{i:02}.png")


def test_a_folder_for_each_class(tmp_path):
    root = tmp_path / "mine"
    write(root, 30, save_classes)
    rows = all_records(root)
    tools = {row.name for row in rows if row.class_word == "tool"}
    assert len(rows) == 30 + len(tools) and len(tools) == sum(i % 3 > 0 and i % 5 > 0 for i in range(30))
    for row in rows:
        assert row.mask == root / "masks" / row.mask_name and row.prompts["p1"] == row.class_word
        assert row.absent == (() if row.name in tools else ("tool",))
    data = datasets.open_dataset(str(root), ["train", "val"], 32, prompts="class")
    assert len(data["train"]) > len(data["train"].images)
    Image.new("RGB", (50, 40)).save(root / "images/alone.png")
    Image.new("L", (50, 40)).save(root / "masks/tool/other.png")
    problems = {row.problem for row in all_records(root)}
    assert problems == {None, "image without mask", "mask without image"}


def test_subfolders_of_patients_are_no_classes(tmp_path):
    for i in range(12):
        for content in ("images", "masks"):
            (tmp_path / content / f"patient{i}").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / f"images/patient{i}/a.png")
        Image.new("L", (9, 9), 255).save(tmp_path / f"masks/patient{i}/a.png")
    assert {row.class_word for row in all_records(tmp_path)} == {None}


def test_healthy_controls_open_for_evaluation_alone(tmp_path):
    def save_empty(folder, i):
        folder.mkdir(exist_ok=True)
        Image.new("L", (50, 40)).save(folder / f"{i:02}.png")

    write(tmp_path / "plain/test", 3, save_empty)
    write(tmp_path / "plain/train", 3, save_empty)
    metadata = dict(data_root="data", split_seed=0, prompts="x", image_size=32, recipe=dict(seed=5))
    metadata["dataset"] = str(tmp_path / "plain")
    for split in ("train", "test"):
        data, _ = datasets.open_run_split(metadata, split)
        assert len(data) == (3 if split == "test" else 2) and not data.masks.any()
    assert len(datasets.open_dataset(metadata["dataset"], ["test"], 32, prompts="x")["test"]) == 3
    with pytest.raises(ValueError, match="Every mask .* is empty"):
        datasets.open_dataset(metadata["dataset"], ["train"], 32, prompts="x")
    name_labels(tmp_path / "plain/test")
    rows = datasets.records(metadata["dataset"], "test")
    assert [row.class_word for row in rows] == 3 * ["liver", "tumour"], "every class is asked of every image"
    assert {row.absent for row in rows} == {()}


def test_several_bright_colours_are_refused_where_nothing_tells_what_they_are(tmp_path):
    colours = np.zeros((40, 50, 3), np.uint8)
    colours[:9, :9] = 0, 255, 0
    colours[20:30, 10:30] = 255, 0, 0
    for i in range(12):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.new("RGB", (50, 40)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(colours).save(tmp_path / f"masks/{i}.png")
    with pytest.raises(ValueError, match="several colours.*masks-from-colours"):
        datasets.open_dataset(str(tmp_path), ["train"], 32, prompts="x")
    assert read_mask(tmp_path / "masks/0.png").sum() == 281, "publishers' masks of two colours are one class"
    colours[:9, :9] = 250, 40, 30
    Image.fromarray(colours).save(tmp_path / "one.png")
    assert read_mask(tmp_path / "one.png", one_colour=True).sum() == 281


def test_a_void_strip_is_not_taken_for_the_lesion(tmp_path):
    numbers = (label_map(1) == 2).astype(np.uint8)
    numbers[-4:] = 255
    Image.fromarray(numbers).save(tmp_path / "void.png")
    with pytest.raises(ImageError, match="also 1;.*dataset.json"):
        read_mask(tmp_path / "void.png")


FORMS = ["label maps", "a folder for each class", "without classes", "annotation files"]


@pytest.mark.parametrize("form", FORMS)
def test_check_names_the_form(form, maps, folder, tmp_path, capsys):
    root = dict(zip(["label maps", "annotation files"], [maps, folder])).get(form, tmp_path / "mine")
    if form == "a folder for each class":
        write(root, 20, save_classes)
    elif form == "without classes":
        write(root, 20, save_map)
        for file in (root / "masks").iterdir():
            Image.new("L", (50, 40), 255).save(file)
    datasets.main(["--check", str(root), "--out", str(tmp_path / "sheet.png")])
    out = capsys.readouterr().out
    assert form in out
    if form == "label maps":
        train = [row.class_word for row in datasets.records(str(root), "train")]
        assert f"liver ({train.count('liver')}), tumour ({train.count('tumour')})" in out
