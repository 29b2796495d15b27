"""nnU-Net's folders: volumes, images of two dimensions, channels, regions, ignored pixels, a test set."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.raw.volumes import body, shown, write_nifti
from vlsm.raw.download import Download
from vlsm.raw.formats.nnunet import read


def write_classes(root, labels):
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": "any"}))


def write_flat(root, case, labels, part="Tr"):
    """Write an image of two dimensions in three colours, with its class numbers."""
    for folder in ("images", "labels"):
        (root / f"{folder}{part}").mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*labels.shape, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / f"images{part}" / f"{case}_0000.png")
    Image.fromarray(labels).save(root / f"labels{part}" / f"{case}.png")


def reasons(download):
    skipped = {name: reason for reason, names in download.skipped.items() for name in names}
    return {name: reason for name, reason in skipped.items() if "--keep-empty" not in reason}


@pytest.mark.parametrize(
    "labels", [{"background": 0, "liver": 1, "organ": [1, 2]}, {"0": "background", "1": "liver"}]
)
def test_volumes(tmp_path, labels):
    pytest.importorskip("nibabel")
    values, numbers = body()
    if len(labels) == 2:
        numbers[numbers == 2] = 0
    for name in (
        "imagesTr/c_1_0000",
        "imagesTr/c_1_0001",
        "imagesTs/t_0000",
        "imagesTr/msd_3",
        "imagesTr/x_0000",
    ):
        write_nifti(tmp_path / f"{name}.nii.gz", values)
    for name in ("labelsTr/c_1", "labelsTs/t", "labelsTr/msd_3"):
        write_nifti(tmp_path / f"{name}.nii.gz", numbers)
    write_classes(tmp_path, labels)
    download = Download(tmp_path)
    images = {image.name: image for image in read(download, keep_empty=0)}
    assert {name.rpartition("/")[0] for name in images} == {"train/c_1", "train/msd_3", "test/t"}
    first = images["train/c_1/001.png"].masks
    assert np.array_equal(first["liver"], shown(numbers == 1, 2, 1))
    if len(labels) == 3:
        assert np.array_equal(first["organ"], shown(numbers > 0, 2, 1)), "a region is a union"
        assert images["test/t/002.png"].masks.keys() == {"organ"}
    assert reasons(download) == {
        "imagesTr/c_1_0001.nii.gz": "only channel 0000 is read",
        "imagesTr/x_0000.nii.gz": "image without mask",
    }
    assert next(read(Download(tmp_path), axis=0, keep_empty=1)).image.shape == (5, 7)


def test_images_as_they_are(tmp_path):
    labels = np.zeros((5, 7), np.uint8)
    write_flat(tmp_path, "healthy", labels)
    labels[1:3, 2:] = 1
    write_flat(tmp_path, "a_1", labels)
    for case, number in (("ignored", 4), ("unnamed", 9)):
        labels[0, 0] = number
        write_flat(tmp_path, case, labels)
    write_classes(tmp_path, {"background": 0, " polyp ": 1, "ignore": 4})
    download = Download(tmp_path)
    a, healthy, ignored = read(download)
    assert ignored.masks["ignore"].sum() == 1
    assert (a.name, a.image, a.spacing) == ("a_1.png", "imagesTr/a_1_0000.png", None)
    labels[0, 0] = 0
    assert a.masks.keys() == {"polyp"} and np.array_equal(a.masks["polyp"], labels == 1)
    assert healthy.masks == {}
    named = reasons(download)
    assert len(named) == 1
    assert "numbers [9]" in named["imagesTr/unnamed_0000.png, labelsTr/unnamed.png"]


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"background": 0, "../liver": 1}, "cannot name a folder"),
        ({"background": 0, "liver": "one"}, "'labels' should be as in"),
        ({"background": 0, "liver": True}, "'labels' should be as in"),
        (["liver"], "'labels' should be an object"),
    ],
)
def test_classes_that_cannot_be_right(tmp_path, labels, message):
    write_flat(tmp_path, "a", np.ones((3, 4), np.uint8))
    write_classes(tmp_path, labels)
    with pytest.raises(ValueError, match=message):
        list(read(Download(tmp_path)))


def test_one_data_set_at_a_time(tmp_path):
    for name in ("Dataset001_A", "Dataset002_B"):
        (tmp_path / name).mkdir()
        write_flat(tmp_path / name, "a", np.ones((3, 4), np.uint8))
        write_classes(tmp_path / name, {"background": 0, "liver": 1})
    with pytest.raises(ValueError, match="Dataset001_A/dataset.json, Dataset002_B/dataset.json. Name"):
        list(read(Download(tmp_path)))
    assert len(list(read(Download(tmp_path / "Dataset002_B")))) == 1
