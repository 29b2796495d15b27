"""A folder of one's own: how its files are paired, what its masks hold, how it is split."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import datasets
from vlsm.data.check import describe_splits, inspect_splits, similar_splits
from vlsm.data.folders import SplitRules, folder_splits, parse_fold
from vlsm.data.images import ImageError, MaskUnion, read_image, read_mask
from vlsm.data.pairing import common_ends, match_names
from vlsm.data.records import group_of
from vlsm.data.resize import least_side, resize_mask
from vlsm.system import console


def blob(i, size=(40, 50)):
    mask = np.zeros(size, bool)
    mask[5 + i % 7 : 20, 10 : 20 + i % 9] = True
    return mask


def save(file, pixels, **settings):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **settings)


def fill(
    root,
    names,
    mask_names=None,
    mask=lambda i: blob(i).astype(np.uint8) * 255,
    images="images",
    masks="masks",
):
    """An image and a mask for each name below a folder."""
    rng = np.random.default_rng(0)
    for i, (name, mask_name) in enumerate(zip(names, mask_names or names)):
        save(root / images / name, rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        save(root / masks / mask_name, mask(i))
    return root


def splits(root, **rules):
    return folder_splits(root, SplitRules(**rules))


def everything(root, **rules):
    return [record for rows in splits(root, **rules).values() for record in rows]


@pytest.fixture(autouse=True)
def anew():
    console._printed.clear()


# Pairing


@pytest.mark.parametrize(
    "image, mask",
    [
        ("ISIC_{:07}.jpg", "ISIC_{:07}_segmentation.png"),
        ("{}_training.tif", "{}_manual1.gif"),
        ("case_{:03}_0000.png", "case_{:03}.png"),
        ("b ({}).png", "b ({})_mask.png"),
        ("img-{}.png", "mask-{}.png"),
        ("deep/er/x.{}.png", "deep/er/x.{}.GT.png"),
    ],
)
def test_names_that_differ_in_one_ending_or_beginning_are_paired(image, mask, tmp_path, capsys):
    numbers = [1, 2, 3, 10, 11, 21]
    fill(tmp_path, [image.format(n) for n in numbers], [mask.format(n) for n in numbers])
    rows = everything(tmp_path)
    assert len(rows) == 6 and not any(record.problem for record in rows)
    for record in rows:
        number = numbers[[image.format(n) for n in numbers].index(record.name)]
        assert record.mask.name == mask.format(number).split("/")[-1]
    assert capsys.readouterr().err.count("6 masks are named") == 1


def test_a_stray_file_does_not_hinder_the_pairs(tmp_path):
    fill(tmp_path, [f"{n}.png" for n in range(9)], [f"{n}_mask.png" for n in range(9)])
    save(tmp_path / "masks/legend.png", blob(1).astype(np.uint8))
    rows = everything(tmp_path)
    assert [record.problem for record in rows if record.problem] == ["mask without image"] and len(rows) == 10


def test_masks_named_after_classes_are_explained(tmp_path, capsys):
    fill(tmp_path, [f"{n:03}.png" for n in range(6)], [f"{n:03}_polyp.png" for n in range(6)])
    fill(tmp_path, [f"{n:03}.png" for n in range(6)], [f"{n:03}_tool.png" for n in range(6)])
    everything(tmp_path)
    said = capsys.readouterr().err
    assert "IMAGE_polyp, IMAGE_tool" in said or "IMAGE_tool, IMAGE_polyp" in said


def test_other_names_are_not_paired():
    images = [f"patient1_{n}" for n in range(5)]
    assert match_names(set(images), {f"patient2_{n}" for n in range(5)}, "x") == {}, "another patient's masks"
    assert match_names({"a", "b", "c"}, {"d", "e", "f"}, "x") == {}
    assert match_names({"a_1", "b_2"}, set(), "x") == {} and common_ends([]) == ("", "")
    few = match_names({f"x{n}" for n in range(9)}, {"x1_mask", "z_mask", "y_mask"}, "x")
    assert few == {}, "one of three is no rule"


def test_further_masks_of_an_image_are_united(tmp_path, capsys):
    names = [f"benign ({n}).png" for n in range(4)]
    fill(tmp_path, names, [name.replace(").", ")_mask.") for name in names])
    other = np.zeros((40, 50), np.uint8)
    other[30:, 40:] = 255
    save(tmp_path / "masks/benign (2)_mask_1.png", other)
    rows = {record.name: record for record in everything(tmp_path)}
    assert len(rows) == 4 and not any(record.problem for record in rows.values())
    assert (read_mask(rows["benign (2).png"].mask) == (blob(2) | (other > 0))).all()
    assert len(rows["benign (2).png"].files) == 3 and "are united" in capsys.readouterr().err
    data = datasets.open_dataset(str(tmp_path), ["train", "val", "test"], 32, prompts="x")
    assert sum(map(len, data.values())) == 4
    save(tmp_path / "masks/benign (3)_mask_1.png", other[:9])
    with pytest.raises(ValueError, match="masks of one image differ in size"):
        datasets.open_dataset(str(tmp_path), ["train", "val", "test"], 32, prompts="x")


def test_folders_are_found_in_any_case_and_number(tmp_path):
    fill(tmp_path / "Train", ["a.png", "b.png"], images="Image", masks="Mask")
    fill(tmp_path / "VAL", ["c.png"], images="imgs", masks="GT")
    assert {split: len(rows) for split, rows in splits(tmp_path).items()} == {"train": 2, "val": 1}


def test_images_without_a_mask_are_empty_if_that_is_said(tmp_path):
    fill(tmp_path / "mine", [f"{n}.png" for n in range(6)])
    (tmp_path / "mine/masks/3.png").unlink()
    with pytest.raises(ValueError, match="1 x image without mask: 3.png\n.*\n.*pass --no-mask-is-empty"):
        datasets.open_dataset(str(tmp_path / "mine"), ["train", "val", "test"], 32, prompts="x")
    rules = SplitRules(no_mask_is_empty=True)
    data = datasets.open_dataset(
        str(tmp_path / "mine"), ["train", "val", "test"], 32, rules=rules, prompts="x", need_foreground=()
    )
    empty = [r for split in data.values() for r, mask in zip(split.records, split.masks) if not mask.any()]
    assert [record.name for record in empty] == ["3.png"] and empty[0].mask == MaskUnion((), empty[0].image)
    assert read_mask(empty[0].mask).shape == (40, 50) and not read_mask(empty[0].mask).any()


def test_what_lacks_its_mask_is_not_taken_from_the_cache(tmp_path, capsys):
    fill(tmp_path / "mine", [f"{n}.png" for n in range(6)])
    (tmp_path / "mine/masks/3.png").unlink()
    settings = dict(prompts="x", cache_dir=tmp_path / "cache", need_foreground=())
    wanted = ["train", "val", "test"]
    rules = SplitRules(no_mask_is_empty=True)
    datasets.open_dataset(str(tmp_path / "mine"), wanted, 32, rules=rules, **settings)
    with pytest.raises(ValueError, match="1 x image without mask: 3.png"):
        datasets.open_dataset(str(tmp_path / "mine"), wanted, 32, **settings)
    capsys.readouterr()
    datasets.main(["--check", str(tmp_path / "mine"), "--out", str(tmp_path / "sheet.png")])
    assert "UNUSABLE: 1 (3.png (image without mask))" in capsys.readouterr().out


def test_a_class_that_only_train_has_is_told(tmp_path):
    fill(tmp_path, [f"{n}.png" for n in range(4)])
    rows = everything(tmp_path)
    for record, word in zip(rows, ("liver", "cyst", None, "cyst")):
        record.class_word = word
    summaries = inspect_splits(dict(train=rows[:3], val=rows[:2], test=rows[:1]))
    text = describe_splits("mine", summaries, similar_splits(summaries))
    assert text.count("WARNING: no record") == 1
    assert "WARNING: no record of 'cyst', which train has" in text.split("mine test")[1]


def test_a_healthy_image_beside_classes_is_a_record_without_foreground(tmp_path):
    fill(tmp_path / "maps", [f"{n}.png" for n in range(9)], mask=lambda i: blob(i) * np.uint8(i % 3))
    (tmp_path / "maps/dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "cyst": 2}})
    )
    rows = everything(tmp_path / "maps")
    assert sorted(record.name for record in rows) == [f"{n}.png" for n in range(9)]
    for record in rows:
        empty = int(record.name[0]) % 3 == 0
        assert read_mask(record.mask).any() != empty and record.class_word in ("liver", "cyst")
        assert len(record.absent) == 1 and record.class_word not in record.absent


def test_what_is_left_out_is_counted_by_ending(tmp_path, capsys):
    fill(tmp_path, [f"{n}.jfif" for n in range(3)] + ["x.jp2"], [f"{n}.png" for n in range(3)] + ["x.png"])
    for name in ("a.heic", "b.HEIC", "c.nii.gz", "readme", ".hidden.dcm", "notes.txt"):
        (tmp_path / "images" / name).write_bytes(b"x")
    assert len(everything(tmp_path)) == 4
    assert "not read: 2 .heic, 1 .nii.gz, 1 without ending." in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, said",
    [
        ("masks/1.nii.gz", "holds 1 .nii.gz files.*--import nifti"),
        ("labels/1.txt", "--import yolo"),
        ("images/1.json", "--import labelme"),
        ("imagesTr/1_0000.png", "--import nnunet"),
    ],
)
def test_what_is_brought_in_is_named(file, said, tmp_path):
    save(tmp_path / "images/1.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=said):
        splits(tmp_path)


# Values


def test_one_value_in_all_masks_is_the_foreground(tmp_path, capsys):
    names = [f"{n}.png" for n in range(6)]
    red = np.array([128, 0, 0], np.uint8)
    for name, mask in (
        ("number", lambda i: blob(i) * np.uint8(2)),
        ("grey", lambda i: blob(i) * np.uint8(128)),
        ("colour", lambda i: blob(i)[..., None] * red),
        ("deep", lambda i: blob(i).astype(np.uint16) * 2),
    ):
        rows = everything(fill(tmp_path / name, names, mask=mask))
        assert all((read_mask(r.mask) == blob(int(r.name[0]))).all() for r in rows)
        assert "alone, which is taken for foreground" in capsys.readouterr().err
        with pytest.raises(ImageError, match="also 2|also 128"):
            read_mask(rows[0].files[1])


def test_numbers_that_may_be_classes_are_refused(tmp_path):
    names = [f"{n}.png" for n in range(8)]
    for name, mask in (
        ("two", lambda i: blob(i) * np.uint8(1 + i % 2)),
        ("same", lambda i: dots(5)),
        ("gaps", lambda i: dots(2 + i) * np.uint8(2)),
        ("pieces", lambda i: np.hstack([dots(2 + i)] * 2)[:, ::2]),
        ("void", lambda i: np.where(np.arange(50) > 45, 255, blob(i)).astype(np.uint8)),
    ):
        fill(tmp_path / name, names, mask=mask)
        with pytest.raises(ValueError, match="class numbers, name them in dataset.json"):
            datasets.open_dataset(str(tmp_path / name), ["train", "val", "test"], 32, prompts="x")


def dots(n):
    """Numbers 1 to n, each a blob."""
    numbers = np.zeros((40, 50), np.uint8)
    for k in range(n):
        numbers[4 * (k // 8) + 1 : 4 * (k // 8) + 4, 6 * (k % 8) : 6 * (k % 8) + 4] = k + 1
    return numbers


def test_instances_of_one_class_are_united(tmp_path, capsys):
    fill(tmp_path, [f"{n}.png" for n in range(8)], mask=lambda i: dots(2 + i))
    rows = everything(tmp_path)
    assert all((read_mask(r.mask) == (dots(2 + int(r.name[0])) > 0)).all() for r in rows)
    assert "instances of one class" in capsys.readouterr().err
    data = datasets.open_dataset(str(tmp_path), ["train"], 32, prompts="x")["train"]
    assert set(np.unique(data.masks)) == {0, 1}


def test_a_smoothed_mask_is_cut_at_half(tmp_path, capsys):
    sharp = (np.add.outer((np.arange(90) - 45) ** 2, (np.arange(70) - 30) ** 2) < 500) * 255.0
    for sigma in (0.6, 1.0):
        smooth = ndimage.gaussian_filter(sharp, sigma).astype(np.uint8)
        save(tmp_path / "s.png", smooth)
        assert (read_mask(tmp_path / "s.png") == (smooth > 127)).all()
    assert capsys.readouterr().err.count("grey along its edges") == 1
    soft = ndimage.gaussian_filter(sharp, 8).astype(np.uint8)
    rim = np.where(ndimage.binary_dilation(sharp > 0, iterations=2), 128, 0).astype(np.uint8)
    rim[sharp > 0] = 255
    for name, values in (("soft", soft), ("rim", rim), ("levels", (soft // 64 * 64))):
        save(tmp_path / f"{name}.png", values)
        with pytest.raises(ImageError, match="also"):
            read_mask(tmp_path / f"{name}.png")


@pytest.mark.parametrize("other", [(0, 255, 0), (255, 255, 0), (255, 0, 255), (90, 0, 0)])
def test_colours_that_may_be_classes_are_refused(other, tmp_path):
    def both(i):
        mask = blob(i)[..., None] * np.array((255, 128, 0), np.uint8)
        mask[30:, 40:] = other
        return mask

    def each(i):
        return blob(i)[..., None] * np.array((255, 128, 0) if i % 2 else other, np.uint8)

    names = [f"{n}.png" for n in range(6)]
    for name, mask in (("both", both), ("each", each)):
        fill(tmp_path / name, names, mask=mask)
        with pytest.raises(ValueError, match="colour|also 90"):
            datasets.open_dataset(str(tmp_path / name), ["train", "val", "test"], 32, prompts="x")


def test_one_colour_of_a_jpeg_is_one_colour(tmp_path):
    big = np.kron(blob(3), np.ones((6, 6), bool))[..., None] * np.array((255, 40, 20), np.uint8)
    save(tmp_path / "m.jpg", big, quality=80)
    assert (read_mask(tmp_path / "m.jpg", one_colour=True) == (big[..., 0] > 0)).mean() > 0.99


def test_sixteen_bits_of_colour_are_refused_by_name(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "m.tif", np.full((9, 9, 3), 255, np.uint16), photometric="rgb")
    for reader in (read_image, read_mask):
        with pytest.raises(ImageError, match="m.tif.* 16 bits a channel and in colour"):
            reader(tmp_path / "m.tif")


def test_a_mask_of_a_turned_photo_is_explained(tmp_path):
    fill(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], ["a.png", "b.png", "c.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "images/b.jpg").save(tmp_path / "images/b.jpg", exif=exif)
    with pytest.raises(ValueError, match="EXIF orientation turns, and mask that is not turned.*b.jpg"):
        datasets.open_dataset(str(tmp_path), ["train", "val", "test"], 32, prompts="x")


# Resizing


def test_no_lesion_vanishes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((rng.integers(100, 300), rng.integers(100, 300)), bool)
        for _ in range(4):
            y, x = rng.integers(0, 90, 2)
            mask[y : y + rng.integers(1, 4), x : x + rng.integers(1, 4)] = True
        small = resize_mask(mask, 24)
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        rows, columns = np.nonzero(mask)
        places = small[rows * 24 // mask.shape[0], columns * 24 // mask.shape[1]]
        assert all(places[labels[rows, columns] == k].any() for k in range(1, count + 1))
        nearest = np.array(Image.fromarray(mask.astype(np.uint8)).resize((24, 24), Image.NEAREST))
        assert (small >= nearest).all()
    mask = np.zeros((800, 800), np.uint8)
    mask[401:404, 401:404] = 1
    mask[:100] = 255
    small = resize_mask(mask, 16)
    assert (small == 1).sum() == 1 and small[8, 8] == 1 and (small[:2] == 255).all()
    assert least_side(mask) == 267 and least_side(mask == 7) == 0
    assert (resize_mask(mask, least_side(mask)) == 1).any()


def test_small_lesions_and_masks_without_background_are_said(tmp_path, capsys):
    def speck(i):
        mask = np.zeros((40, 50), np.uint8)
        mask[7, i] = 255
        return mask

    fill(tmp_path / "small", [f"{n}.png" for n in range(6)], mask=speck)
    datasets.open_dataset(str(tmp_path / "small"), ["train"], 16, prompts="x")
    assert "the lesions of 4 of 4 masks are too small for 16 x 16" in capsys.readouterr().out
    fill(tmp_path / "full", [f"{n}.png" for n in range(6)], mask=lambda i: np.full((40, 50), 255, np.uint8))
    datasets.open_dataset(str(tmp_path / "full"), ["train"], 16, prompts="x")
    assert "4 of 4 masks cover all corners, or have no background" in capsys.readouterr().out


# Splits


@pytest.mark.parametrize("n", [3, 5, 10, 20, 59, 60, 200])
def test_no_part_is_empty_and_most_train(n, tmp_path):
    for k in range(n):
        for part in ("images", "masks"):
            (tmp_path / part).mkdir(exist_ok=True)
            save(tmp_path / part / f"{k}.png", np.full((2, 2), 255, np.uint8))
    counts = {split: len(rows) for split, rows in splits(tmp_path).items()}
    assert sum(counts.values()) == n and min(counts.values()) > 0 and len(counts) == 3
    assert counts["train"] >= min(0.6 * n, n - 2)


def parts_of_groups(root, pattern, **rules):
    places = {}
    for split, rows in splits(root, **rules).items():
        for record in rows:
            places.setdefault(group_of(record.name, pattern), set()).add(split)
    return places


def test_groups_stay_in_one_part(tmp_path, capsys):
    fill(tmp_path / "flat", [f"patient{k // 4:02}_{k % 4}.png" for k in range(40)])
    fill(tmp_path / "deep", [f"p{k // 4:02}/{k % 4}.png" for k in range(40)])
    pattern = r"patient\d+"
    assert any(len(places) > 1 for places in parts_of_groups(tmp_path / "flat", pattern).values())
    for root, rules in ((tmp_path / "flat", dict(group=pattern)), (tmp_path / "deep", {})):
        places = parts_of_groups(root, rules.get("group", r"^[^/]+"), **rules)
        assert len(places) == 10 and all(len(found) == 1 for found in places.values())
        assert set.union(*places.values()) == {"train", "val", "test"}
    assert "folders: 8 train, 1 val, 1 test" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--group 'case' is found in no image's name"):
        splits(tmp_path / "flat", group="case")
    assert group_of("case_12_3.png", r"case_(\d+)_") == "12" and group_of("x.png", "y") == "x.png"


def test_few_subfolders_are_no_patients(tmp_path):
    fill(tmp_path, [f"{'ab'[k % 2]}/{k}.png" for k in range(20)])
    assert all(len(found) > 1 for found in parts_of_groups(tmp_path, r"^[^/]+").values())


def test_a_group_in_two_parts_of_ones_own_is_said(tmp_path, capsys):
    fill(tmp_path, [f"{part}/p{k % 6}_{k}.png" for part in ("train", "val", "test") for k in range(6)])
    assert {split: len(rows) for split, rows in splits(tmp_path).items()} == dict(train=6, val=6, test=6)
    splits(tmp_path, group=r"p\d")
    assert "WARNING: 6 are in two splits" in capsys.readouterr().err


def test_lists_are_the_split(tmp_path):
    fill(tmp_path, [f"s/{k}.png" for k in range(8)])
    (tmp_path / "train.txt").write_text("\ufeffs/0.png\n./images/s/1.png\ns/2\n\ns\\3.png\n", "utf-8")
    (tmp_path / "valid.txt").write_text("/data/mine/images/s/4.jpg")
    (tmp_path / "test.txt").write_text("s/5.png")
    names = {split: [r.name[2] for r in rows] for split, rows in splits(tmp_path).items()}
    assert names == {"train": list("0123"), "val": ["4"], "test": ["5"]}
    (tmp_path / "test.txt").write_text("s/4.png")
    with pytest.raises(ValueError, match="valid.txt' names .*4.jpg', which the list of test has, too"):
        splits(tmp_path)
    (tmp_path / "test.txt").write_text("s/9.png")
    with pytest.raises(ValueError, match="test.txt' names 's/9.png', which is no image here"):
        splits(tmp_path)


def test_folds_hold_out_each_group_once(tmp_path):
    fill(tmp_path / "mine", [f"p{k // 3}_{k % 3}.png" for k in range(30)])
    tested = []
    for k in range(1, 6):
        found = splits(tmp_path / "mine", group=r"p\d", fold=(k, 5))
        groups = {split: {record.name[:2] for record in rows} for split, rows in found.items()}
        assert {split: len(names) for split, names in groups.items()} == dict(train=6, val=2, test=2)
        assert not groups["train"] & groups["val"] and not groups["test"] & (groups["train"] | groups["val"])
        tested += [record.name for record in found["test"]]
    assert sorted(tested) == sorted(f"p{k // 3}_{k % 3}.png" for k in range(30))
    with pytest.raises(ValueError, match="--fold 1/2.*3 folds"):
        splits(tmp_path / "mine", fold=(1, 2))
    with pytest.raises(ValueError, match="has 10 groups"):
        splits(tmp_path / "mine", group=r"p\d", fold=(1, 11))


def test_folds_beside_a_test_split_of_ones_own_validate(tmp_path):
    for part, n in (("train", 6), ("val", 2), ("test", 3)):
        fill(tmp_path / part, [f"{part}{k}.png" for k in range(n)])
    validated = []
    for k in (1, 2):
        found = splits(tmp_path, fold=(k, 2))
        assert {record.name for record in found["test"]} == {"test0.png", "test1.png", "test2.png"}
        validated += [record.name for record in found["val"]]
        assert not {record.name for record in found["train"]} & {record.name for record in found["val"]}
    assert len(validated) == len(set(validated)) == 8


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "a/5", "1", "1/5/2", "-1/5"])
def test_what_is_no_fold_is_refused(text):
    assert parse_fold("2/5") == (2, 5) and parse_fold("10/10") == (10, 10)
    with pytest.raises(ValueError, match="a fold is written such as 2/5"):
        parse_fold(text)


def test_spacing_is_read_by_folder_and_name(tmp_path):
    fill(tmp_path, ["a/1.png", "a/2.png", "b/1.png", "c.png"])
    spacing = {"a": [0.5, 0.7], "a/2.png": [1, 2], "b": [3, 3]}
    (tmp_path / "dataset.json").write_text(json.dumps({"spacing": spacing}))
    found = {record.name: record.spacing for record in everything(tmp_path)}
    assert found == {"a/1.png": (0.5, 0.7), "a/2.png": (1, 2), "b/1.png": (3, 3), "c.png": None}
    for wrong in ([1], [0, 1], ["a", 1], 5, {"a": None}):
        (tmp_path / "dataset.json").write_text(json.dumps({"spacing": wrong}))
        with pytest.raises(ValueError, match="dataset.json': 'spacing.*' should be two lengths in mm"):
            splits(tmp_path)


# What must not be read wrong without a word


def opened(root, **settings):
    return datasets.open_dataset(
        str(root), ["train", "val", "test"], 32, prompts="x", need_foreground=(), **settings
    )


def two(large, small, size=3):
    """A mask of a large piece of one value, or colour, and a small one of another."""

    def mask(i):
        values = np.zeros((40, 50, *np.shape(large)), np.uint8)
        values[blob(i)] = large
        values[30 : 30 + size, 40 : 40 + size] = small
        return values

    return mask


@pytest.mark.parametrize(
    "large, small",
    [
        (255, 1), (255, 2), (255, 100), (255, 128), (255, 200), (255, 230), ((255, 0, 0), (255, 64, 0)),
        ((0, 255, 0), (60, 255, 0)),
    ],
)  # fmt: skip
def test_a_small_second_value_is_refused(large, small, tmp_path):
    for size in (2, 9):
        root = fill(tmp_path / str(size), [f"{n}.png" for n in range(6)], mask=two(large, small, size))
        with pytest.raises(ValueError, match="class numbers, name them|several colours"):
            opened(root)


@pytest.mark.parametrize("colour", [(128, 0, 0), (48, 112, 32), (10, 20, 90)])
def test_palettes_of_a_dark_colour_are_read_by_colour(colour, tmp_path):
    names = [f"{n}.gif" for n in range(6)]
    fill(tmp_path, names)
    for i, name in enumerate(names):
        image = Image.fromarray((~blob(i)).astype(np.uint8), "P")  # the colour is number 0, black is 1
        image.putpalette([*colour, 0, 0, 0])
        image.save(tmp_path / "masks" / name)
    assert all((read_mask(r.mask) == blob(int(r.name[0]))).all() for r in everything(tmp_path))


def test_colours_of_folders_of_classes_and_of_every_other_file_are_compared(tmp_path):
    root = fill(tmp_path / "classes", [f"{n}.png" for n in range(6)], mask=two((255, 0, 0), (0, 255, 0)))
    (root / "masks").rename(root / "liver")
    (root / "masks").mkdir()
    (root / "liver").rename(root / "masks/liver")
    with pytest.raises(ValueError, match="several colours"):
        opened(root)
    each = lambda i: blob(i)[..., None] * np.array([(255, 0, 0), (0, 255, 0)][i % 2], np.uint8)  # noqa: E731
    fill(tmp_path / "each", [f"{n:03}.png" for n in range(120)], mask=each)
    with pytest.raises(ValueError, match="masks of one class have one colour"):
        opened(tmp_path / "each")


def test_white_with_smooth_edges_has_one_colour(tmp_path):
    def smooth(i):
        disc = np.add.outer((np.arange(40) - 18) ** 2, (np.arange(50) - 20) ** 2) < 90 + i
        return np.repeat(ndimage.gaussian_filter(disc * 255.0, 0.8).astype(np.uint8)[..., None], 3, 2)

    data = opened(fill(tmp_path, [f"{n}.png" for n in range(6)], mask=smooth))
    assert all(mask.any() for split in data.values() for mask in split.masks)


def test_inverted_masks_are_said(tmp_path, capsys):
    fill(tmp_path, [f"{n}.png" for n in range(6)], mask=lambda i: (~blob(i)).astype(np.uint8) * 255)
    datasets.open_dataset(str(tmp_path), ["train"], 32, prompts="x")
    assert "4 of 4 masks cover all corners" in capsys.readouterr().out
    datasets.main(["--check", str(tmp_path), "--out", str(tmp_path / "sheet.png")])
    assert "are they inverted?" in " ".join(capsys.readouterr().out.split())


def test_a_turned_square_photo_is_said(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    for n in range(3):
        save(tmp_path / f"images/{n}.jpg", np.zeros((40, 40, 3), np.uint8), exif=exif)
        save(tmp_path / f"masks/{n}.png", blob(n, (40, 40)).astype(np.uint8) * 255)
    opened(tmp_path)
    assert capsys.readouterr().err.count("turned upright by its EXIF orientation") == 1


def test_label_maps_that_lack_or_repeat_a_file(tmp_path):
    root = fill(tmp_path, [f"{n}.png" for n in range(8)], mask=lambda i: two(1, 2)(i))
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "cyst": 2}}))
    (root / "masks/3.png").unlink()
    with pytest.raises(ValueError, match="1 x image without mask: 3.png"):
        opened(root)
    rows = everything(root, no_mask_is_empty=True)
    [empty] = [record for record in rows if record.name == "3.png"]
    assert empty.class_word in ("liver", "cyst") and not read_mask(empty.mask).any()
    save(root / "masks/4_1.png", two(1, 2)(4))
    with pytest.raises(ValueError, match="several label maps of one image: 4.png"):
        opened(root, rules=SplitRules(no_mask_is_empty=True))


def test_a_mask_without_its_image_is_no_further_one(tmp_path):
    fill(tmp_path, ["scan.png", "scan (2).png", "scan (3).png"])
    save(tmp_path / "masks/scan (11).png", blob(1).astype(np.uint8))
    with pytest.raises(ValueError, match="mask without image: scan .11..png"):
        opened(tmp_path)


@pytest.mark.parametrize("lists", ["Train.TXT", "splits/train.txt"])
def test_lists_are_found_in_any_case_and_in_splits(lists, tmp_path):
    fill(tmp_path, [f"{n}.png" for n in range(6)])
    for name, lines in (
        (lists, "0\n1\n2"),
        (lists.replace("rain", "est"), "5"),
        (lists.replace("train", "val").replace("Train", "Val"), "4"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines)
    assert {split: len(rows) for split, rows in splits(tmp_path).items()} == dict(train=3, val=1, test=1)
    (tmp_path / lists).write_text("0\n1", "utf-16")
    with pytest.raises(ValueError, match="is no text in UTF-8; save it so"):
        splits(tmp_path)


def test_dev_and_holdout_are_splits(tmp_path):
    for part, n in (("train", 3), ("dev", 2), ("holdout", 1)):
        fill(tmp_path, [f"{part}/{part}{k}.png" for k in range(n)])
    assert {split: len(rows) for split, rows in splits(tmp_path).items()} == dict(train=3, val=2, test=1)


def test_splits_of_masks_alone_are_refused(tmp_path):
    fill(tmp_path, [f"{k}.png" for k in range(4)], [f"{'train' if k else 'val'}/{k}.png" for k in range(4)])
    with pytest.raises(ValueError, match="has folders of splits, which .*images' has not"):
        splits(tmp_path)


def test_dataset_json_may_name_the_group(tmp_path):
    fill(tmp_path, [f"v{k // 6}/{k}.png" for k in range(24)])
    assert any(len(found) > 1 for found in parts_of_groups(tmp_path, r"^[^/]+").values())
    (tmp_path / "dataset.json").write_text(json.dumps({"group": "^[^/]+"}))
    assert all(len(found) == 1 for found in parts_of_groups(tmp_path, r"^[^/]+").values())
    assert {record.group for record in everything(tmp_path)} == {"v0", "v1", "v2", "v3"}
    (tmp_path / "dataset.json").write_text(json.dumps({"group": "("}))
    with pytest.raises(ValueError, match="dataset.json': 'group' should be a regular expression"):
        splits(tmp_path)


def test_patients_below_sites_are_groups(tmp_path):
    fill(tmp_path, [f"site{k % 2}/patient{k % 8}/{k}.png" for k in range(40)])
    assert all(len(found) == 1 for found in parts_of_groups(tmp_path, r"patient\d").values())


@pytest.mark.parametrize("encoding, slash", [("utf-8-sig", "/"), ("utf-8", "\\"), ("utf-16", "/")])
def test_annotation_files_of_windows(encoding, slash, tmp_path):
    names = [f"p{n % 3}/{n}.png" for n in range(6)]
    fill(tmp_path, names)
    entries = [
        dict(img_name=n.replace("/", slash), mask_name=n.replace("/", slash), prompts={"p1": "x"})
        for n in names
    ]
    (tmp_path / "anns").mkdir()
    (tmp_path / "anns/train.json").write_bytes(json.dumps(entries).encode(encoding))
    if encoding == "utf-16":
        with pytest.raises(ValueError, match="train.json' is saved in UTF-16; save it in UTF-8"):
            datasets.records(str(tmp_path), "train")
    else:
        rows = datasets.records(str(tmp_path), "train")
        assert [record.name for record in rows] == names and all(record.mask.is_file() for record in rows)


def test_a_folder_of_a_known_name_is_pointed_to(tmp_path, monkeypatch):
    fill(tmp_path / "busi", ["1.png"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of your own is --dataset ./busi"):
        datasets.records("busi", "train")
    assert len(datasets.records("./busi", "train")) == 1


def test_a_run_on_another_data_set_follows_the_rules_of_that_one(folder, tmp_path):
    fill(tmp_path / "mine", [f"{n}.png" for n in range(6)])
    metadata = dict(
        dataset=str(tmp_path / "mine"), data_root="data", split_seed=0, group=r"\d", fold="1/3", prompts="x",
        no_mask_is_empty=True, image_size=32, recipe=dict(seed=5),
    )  # fmt: skip
    assert len(datasets.open_run_split(metadata)[0]) == 2, "a third of its own"
    (tmp_path / "mine").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere/mine")
    data, _ = datasets.open_run_split(metadata, dataset=str(tmp_path / "elsewhere/mine"))
    assert len(data) == 2, "it has moved"
    assert len(datasets.open_run_split(metadata, dataset=str(folder))[0]) == 6
