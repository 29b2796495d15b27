"""Data sets: layouts, splits, what is wrong with them, pictures of all kinds, augmentation."""

import json
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from tests.conftest import disk, normalise, write_demo, write_pair
from vlsm.data.augment import affine_matrices, augment
from vlsm.data.folders import SplitRules
from vlsm.data.images import read_image, read_mask
from vlsm.data.records import Record, choose_prompt, describe_groups, group_names, group_of
from vlsm.data.resize import resize_image, resize_mask
from vlsm.mini import demo


def open_all(path, splits=("train", "val", "test"), **kw):
    return datasets.open_dataset(str(path), splits, 32, **kw)


def test_annotated_folder(folder):
    data = open_all(folder)
    assert [len(d) for d in data.values()] == [24, 6, 6]
    assert data["train"].images.shape == (24, 3, 32, 32) and data["train"].masks.shape == (24, 32, 32)
    record = data["test"].records[0]
    want = resize_image(read_image(record.image), 32).transpose(2, 0, 1)
    assert (data["test"].images[0] == want).all()
    assert (data["test"].masks[0] == resize_mask(read_mask(record.mask), 32)).all()
    assert record.class_word == "disk"


def test_known_name_is_found_below_the_data_root(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "root" / "kvasir_polyp")
    assert len(datasets.records("kvasir", "train", tmp_path / "root")) == 24
    assert datasets.records("kvasir", "val", tmp_path / "root")[0].class_word == "polyp"


def test_camus_reads_its_validation_from_the_train_folder(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "camus"
    for part in ("train", "test"):
        image, mask = disk(rng, 20, 20)
        (root / "images" / part).mkdir(parents=True)
        (root / "masks" / part / "mask_1").mkdir(parents=True)
        Image.fromarray(image).save(root / "images" / part / "a.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / part / "mask_1" / "a_gt.png")
    (root / "anns").mkdir()
    for split in ("train", "val", "test"):
        entry = dict(
            img_name="a.png",
            mask_name="mask_1/a_gt.png",
            prompts=dict(p0="", p1=["Myocardium of the heart.", "..."]),
        )
        (root / "anns" / f"{split}.json").write_text(json.dumps([entry]))
    paths = {s: datasets.records("camus", s, tmp_path)[0].image.parent.name for s in ("train", "val", "test")}
    assert paths == dict(train="train", val="train", test="test")
    assert datasets.records("camus", "val", tmp_path)[0].class_word == "Myocardium"


def test_image_shared_by_several_masks_is_kept_once(folder):
    file = folder / "anns" / "val.json"
    entries = json.loads(file.read_text())
    entries.append(dict(entries[0], mask_name=entries[1]["mask_name"]))
    file.write_text(json.dumps(entries))
    data = open_all(folder, ["val"])["val"]
    assert len(data) == 7 and len(data.images) == 6 and data.image_of.tolist() == [0, 1, 2, 3, 4, 5, 0]
    pixels, masks = data.batch([6, 0])
    assert (pixels[0] == pixels[1]).all() and not (masks[0] == masks[1]).all()


def test_other_extension_and_case_are_found_by_stem(folder):
    (folder / "images" / "d0.png").rename(folder / "images" / "D0.PNG")
    Image.open(folder / "images" / "d1.png").save(folder / "images" / "d1.bmp")
    (folder / "images" / "d1.png").unlink()
    data = open_all(folder, ["train"])["train"]
    assert [r.image.name for r in data.records[:2]] == ["D0.PNG", "d1.bmp"]
    shutil.copy(folder / "images" / "d1.bmp", folder / "images" / "d1.tif")
    with pytest.raises(ValueError, match="2 files share its stem: d1.bmp, d1.tif"):
        open_all(folder, ["train"])


def own(root, n, **sizes):
    rng = np.random.default_rng(1)
    for i in range(n):
        write_pair(root, f"case{i:03d}", *disk(rng, 24, 24))
    return root


def test_own_folder_splits_by_name_and_a_file_keeps_its_side(tmp_path):
    root = own(tmp_path / "mine", 60)
    before = {r.name: s for s in ("train", "val", "test") for r in datasets.records(str(root), s)}
    counts = [list(before.values()).count(s) for s in ("train", "val", "test")]
    assert sum(counts) == 60 and counts[0] > 38 and min(counts) > 0
    write_pair(root, "another", *disk(np.random.default_rng(2), 24, 24))
    after = {r.name: s for s in ("train", "val", "test") for r in datasets.records(str(root), s)}
    assert len(after) == 61 and all(after[name] == s for name, s in before.items())
    other = {r.name for r in datasets.records(str(root), "test", rules=SplitRules(seed=1))}
    assert other != {n for n, s in after.items() if s == "test"}


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("training", "validation", "testing"), ("train", "valid", "test")]
)
def test_own_folder_with_split_folders(tmp_path, names):
    for name, n in zip(names, (5, 3, 2)):
        own(tmp_path / "mine" / name, n)
    assert [len(datasets.records(str(tmp_path / "mine"), s)) for s in ("train", "val", "test")] == [5, 3, 2]
    assert list(datasets.read_splits(str(tmp_path / "mine"))) == ["train", "val", "test"]


def test_own_train_folder_without_validation_gives_a_tenth(tmp_path):
    own(tmp_path / "mine" / "train", 60)
    train, val = (datasets.records(str(tmp_path / "mine"), s) for s in ("train", "val"))
    assert len(train) + len(val) == 60 and 0 < len(val) < 15
    assert list(datasets.read_splits(str(tmp_path / "mine"))) == ["train", "val"]


def test_all_problems_come_at_once_grouped(folder, capsys):
    for n, damage in enumerate(("missing", "truncated", "text", "size", "mask")):
        image = folder / "images" / f"d{n}.png"
        if damage == "missing":
            image.unlink()
        elif damage == "truncated":
            image.write_bytes(image.read_bytes()[:200])
        elif damage == "text":
            image.write_text("no picture")
        elif damage == "size":
            Image.new("RGB", (61, 44)).save(image)
        else:
            (folder / "masks" / f"d{n}.png").unlink()
    with pytest.raises(ValueError) as caught:
        open_all(folder, prompts="random")
    text = str(caught.value)
    for line in (
        "5 of 24 records cannot be used",
        "1 x image without file: d0.png",
        "truncated or damaged): d1.png",
        "no image): d2.png",
        "different size: d3.png (61 x 44, mask 60 x 44)",
        "1 x mask without file: d4.png",
        "--skip-bad",
    ):
        assert line in text
    data = open_all(folder, skip_bad=True)
    assert len(data["train"]) == 19 and "dropped 5 of 24" in capsys.readouterr().out


def test_image_without_mask_and_mask_without_image(tmp_path):
    root = own(tmp_path / "mine", 12)
    (root / "masks" / "case003.png").unlink()
    (root / "images" / "case004.png").unlink()
    with pytest.raises(ValueError) as caught:
        open_all(root, prompts="disk")
    assert "1 x image without mask: case003.png" in str(
        caught.value
    ) and "1 x mask without image: case004.png" in str(caught.value)


def test_one_empty_mask_is_data_but_only_empty_ones_are_a_mistake(folder):
    Image.new("L", (60, 44)).save(folder / "masks" / "d24.png")
    assert not open_all(folder, ["val"])["val"].masks[0].any()
    for n in range(24, 30):
        Image.new("L", (60, 44), 0).save(folder / "masks" / f"d{n}.png")
    with pytest.raises(ValueError, match="Every mask .* is empty .* Foreground is white"):
        open_all(folder, ["val"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("{not json", "is not valid JSON"),
        ('{"a": 1}', "should hold a list of records"),
        ('[{"img_name": "d0.png", "prompts": {}}]', "record 0.*mask_name"),
        (
            '[{"img_name": "d0.png", "mask_name": "d0.png", "prompts": {"p1": 3}}]',
            "prompt 'p1' is neither a text",
        ),
        (
            '[{"img_name": "../../etc/x.png", "mask_name": "d0.png", "prompts": {}}]',
            "leaves the data set's folder",
        ),
        (
            '[{"img_name": "/etc/x.png", "mask_name": "d0.png", "prompts": {}}]',
            "leaves the data set's folder",
        ),
    ],
)
def test_broken_annotation_files(folder, content, message):
    (folder / "anns" / "train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_all(folder, ["train"])


def test_missing_data_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="neither known .demo, kvasir, clinicdb") as caught:
        datasets.records("kvasirr", "train")
    with pytest.raises(FileNotFoundError) as caught:
        datasets.records("kvasir", "train", tmp_path)
    for part in (
        str(tmp_path / "kvasir_polyp"),
        "https://datasets.simula.no",
        f"datasets.py --prepare kvasir --src DOWNLOAD --anns medvlsm/data --data-root {tmp_path}",
        "--data-root",
    ):
        assert part in str(caught.value)
    (tmp_path / "odd" / "pictures").mkdir(parents=True)
    with pytest.raises(ValueError, match="should hold images/ and masks/ .*it holds pictures"):
        datasets.records(str(tmp_path / "odd"), "train")


def test_unknown_prompt_key_and_missing_prompts(folder, tmp_path):
    with pytest.raises(ValueError, match="--prompts p8: there is no such key. Known here: p0, p1, p2, p3"):
        open_all(folder, prompts="p8")
    with pytest.raises(ValueError, match="came without prompts"):
        open_all(own(tmp_path / "mine", 30))


def test_evaluation_prompts_are_reproducible_and_differ_between_records(folder):
    found = datasets.records(str(folder), "train")
    draw = lambda *seed: [choose_prompt(r, "random", *seed, i) for i, r in enumerate(found)]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 2 and draw(1, 5) != draw(1)


def test_a_split_as_a_run_was_trained_on_it(folder, tmp_path):
    metadata = dict(
        dataset=str(folder),
        data_root="data",
        split_seed=0,
        prompts="random",
        image_size=32,
        recipe=dict(seed=5),
    )
    data, texts = datasets.open_run_split(metadata)
    assert data.images.shape == (6, 3, 32, 32)
    assert texts == [choose_prompt(r, "random", 5, i) for i, r in enumerate(data.records)]
    assert datasets.open_run_split(metadata, "val", prompts="p2")[1] == ["red disk"] * 6
    assert datasets.open_run_split(metadata, seed=0)[1] != texts
    shutil.copytree(folder, tmp_path / "root" / "kvasir_polyp")
    other, _ = datasets.open_run_split(metadata, "val", "kvasir", tmp_path / "root", "class")
    assert other.records[0].class_word == "polyp"


def test_groups_of_the_bootstrap():
    flat = [Record(f"patient1_{k}.png", "", None, None) for k in range(3)]
    assert group_names(flat) == [f"patient1_{k}.png" for k in range(3)] and describe_groups(flat) == "image"
    assert group_names(flat, r"patient\d") == ["patient1"] * 3
    assert describe_groups(flat, "x") == "match of 'x' in an image's name"
    flat[0].group = "p"
    assert group_names(flat)[:2] == ["p", "patient1_1.png"] and describe_groups(flat) == "patient or folder"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "I", "F"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    source = Image.fromarray(grey)
    if mode in ("I;16", "I", "F"):
        picture = Image.fromarray(
            grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 257
        )
    else:
        picture = source.convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "F", "I") else "x.png")
    picture.save(path)
    got = read_image(path)
    assert got.shape == (16, 16, 3) and got.dtype == np.uint8
    want = np.where(grey > 127, 255, 0) if mode == "1" else grey
    if mode in ("L", "P", "RGBA", "LA", "I;16", "I", "F"):
        assert abs(got[..., 0].astype(int) - want).max() <= 1
    assert got.max() > 250 and got.min() < 5


def test_masks_are_cut_at_127(tmp_path):
    grey = np.zeros((100, 60), np.uint8)
    grey[:, 30:] = 255
    grey[0, 28:32] = 20, 116, 140, 250  # as JPEG leaves them
    want = (grey > 127).tolist()
    for name, picture in (
        ("l", Image.fromarray(grey)),
        ("p", Image.fromarray(grey).convert("P")),
        ("rgb", Image.fromarray(grey).convert("RGB")),
    ):
        picture.save(tmp_path / f"{name}.png")
        assert read_mask(tmp_path / f"{name}.png").tolist() == want
    Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0], [9, 9, 9]]], np.uint8)).save(tmp_path / "colour.png")
    assert read_mask(tmp_path / "colour.png").tolist() == [[True, True, False]]
    Image.fromarray(np.array([[0, 255]], np.uint16)).save(tmp_path / "deep.png")
    assert read_mask(tmp_path / "deep.png").tolist() == [[False, True]]


def test_resizing_is_the_references():
    image = np.random.default_rng(0).integers(0, 256, (37, 51, 3)).astype(np.uint8)
    assert (
        resize_image(image, 20) == np.asarray(Image.fromarray(image).resize((20, 20), Image.BILINEAR))
    ).all()
    mask = torch.rand(37, 51) < 0.5
    nearest = torch.nn.functional.interpolate(mask[None, None].float(), (20, 20), mode="nearest-exact")[0, 0]
    small = torch.from_numpy(resize_mask(mask.numpy(), 20))
    assert (small >= nearest).all(), "what nearest neighbours would lose is added, see test_folders.py"
    mask = torch.from_numpy(np.kron(np.random.default_rng(1).random((8, 9)) < 0.5, np.ones((5, 6))) > 0)
    nearest = torch.nn.functional.interpolate(mask[None, None].float(), (20, 20), mode="nearest-exact")[0, 0]
    assert (torch.from_numpy(resize_mask(mask.numpy(), 20)) == nearest).all()
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalise(pixels), want, atol=1e-5, rtol=1e-5)


def test_demo_is_the_same_for_ever_and_varied():
    for a, b in zip(demo.image_records(5), demo.image_records(5), strict=True):
        assert (a.image == b.image).all() and (a.mask.file == b.mask.file).all() and a.prompts == b.prompts
    images = [demo.image_records(i) for i in range(40)]
    contents = Counter(tuple(record.class_word for record in records) for records in images)
    assert set(contents) == {("polyp",), ("instrument",), ("polyp", "instrument")}
    assert min(contents.values()) > 5
    sample = sum(images, [])
    assert all(read_mask(record.mask).any() for record in sample)
    for record in sample:
        assert record.prompts == {"p0": "", "p1": demo.PROMPTS[record.class_word]}
        assert all(record.class_word in text for text in record.prompts["p1"])


def test_the_demo_as_files_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "COUNTS", dict(train=4, val=2, test=2))
    write_demo(tmp_path / "out")
    for split in ("train", "val", "test"):
        ours, files = datasets.records("demo", split), datasets.records(str(tmp_path / "out"), split)
        for a, b in zip(ours, files, strict=True):
            assert (a.image == read_image(b.image)).all() and (read_mask(a.mask) == read_mask(b.mask)).all()
            assert a.class_word == b.class_word and a.absent == b.absent
        assert [a.prompts for a in ours] == [b.prompts for b in files]


def test_augmentation_moves_image_and_mask_alike():
    masks = torch.zeros(400, 1, 48, 48, dtype=torch.uint8)
    masks[:, :, 14:30, 12:36] = 1
    pixels = masks.expand(-1, 3, -1, -1) * 200
    moved, moved_masks, told = augment(pixels, masks, torch.Generator().manual_seed(0))
    assert moved.min() >= 0 and moved.max() <= 255 and set(moved_masks.unique().tolist()) == {0, 1}
    changed = (moved_masks != masks).flatten(1).any(1)
    assert 0.12 < changed.float().mean() < 0.28
    brighter = (moved.amax((1, 2, 3)) - 200).abs() > 1e-3
    assert 0.12 < (brighter & ~changed).float().sum() / (~changed).float().sum() < 0.28
    agree = ((moved[:, :1] > 100) == (moved_masks > 0)).float().mean()
    assert agree > 0.998
    assert torch.equal(moved[~told], pixels[~told].float()) and torch.equal(masks[~told], moved_masks[~told])
    assert ((changed | brighter) == told).float().mean() > 0.99
    again, _, _ = augment(pixels, masks, torch.Generator().manual_seed(0))
    assert torch.equal(again, moved)


def test_augmentation_stays_in_its_ranges():
    m = affine_matrices(5000, torch.Generator().manual_seed(1))
    angle = torch.atan2(m[:, 1, 0], m[:, 1, 1]).rad2deg()
    assert angle.abs().max() < 5.3 and angle.abs().max() > 4.5
    assert m[:, :, 2].abs().max() <= 0.04 and m[:, :, 2].abs().max() > 0.039
    scale = 1 / m[:, 0, :2].norm(dim=1)
    assert 0.975 < scale.min() < 0.985 and 1.015 < scale.max() < 1.025


def test_a_pattern_that_takes_for_ever_is_refused():
    found = [Record("a" * 40 + ".png", "", None, None)]
    for search in (lambda: group_names(found, "(a+)+$"), lambda: group_of("a" * 40 + "!", "(a+)+$")):
        with pytest.raises(ValueError, match=r"--group '\(a\+\)\+\$' takes too long to search in 'aaa"):
            search()
    assert group_names(found, "a") == ["a"]
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    with ThreadPoolExecutor(1) as pool:  # where no signals come
        assert pool.submit(group_names, found, "a+").result() == ["a" * 40]
