"""NIfTI volumes become slices that look as viewers show them, with equal masks."""

import json

import numpy as np
import pytest

from tests.raw.volumes import SIZES, affine, body, shown, write_nifti
from vlsm.raw.download import Download
from vlsm.raw.formats.nifti import read

pytest.importorskip("nibabel")
WORDS = {"liver": 1, "tumour": 2}


@pytest.fixture
def write(tmp_path):
    """Write pairs (image's path, labels' path), with the same body; returns the folder."""

    def write(*pairs, orientation="RAS", names=True, labels=None):
        for image, mask in pairs:
            write_nifti(tmp_path / image, body()[0], orientation=orientation)
            write_nifti(tmp_path / mask, body()[1] if labels is None else labels, orientation=orientation)
        if names:
            content = json.dumps({"labels": {"background": 0, **WORDS}})
            (tmp_path / "dataset.json").write_text(content)
        return tmp_path

    return write


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_in_any_orientation(write, axis, orientation):
    folder = write(("images/a.nii.gz", "labels/a.nii.gz"), orientation=orientation)
    images = list(read(Download(folder), axis, keep_empty=1))
    values, labels = body()
    grey = np.round((values - values.min()) * (255 / np.ptp(values))).astype(np.uint8)
    assert [image.name for image in images] == [f"a/{k:03}.png" for k in range(values.shape[axis])]
    column, row = np.delete(SIZES, axis)
    for k, image in enumerate(images):
        assert np.abs(image.image - shown(grey, axis, k).astype(int)).max() <= 1
        assert image.image.dtype == np.uint8 and image.spacing == pytest.approx((row, column))
        wanted = {word: shown(labels == n, axis, k) for word, n in WORDS.items()}
        wanted = {word: mask for word, mask in wanted.items() if mask.any()}
        assert image.masks.keys() == wanted.keys()
        assert all(np.array_equal(image.masks[word], wanted[word]) for word in wanted)


def test_axial_slices_show_the_front_above_and_the_right_side_left(write):
    image = next(read(Download(write(("images/a.nii", "masks/a.nii"))), keep_empty=1)).image
    assert image[0].mean() > image[-1].mean() and image[:, 0].mean() > image[:, -1].mean()


def test_window_and_empty_slices(write):
    folder = write(("images/a.nii.gz", "labels/a.nii.gz"))
    values, _ = body()
    images = list(read(Download(folder), keep_empty=0, window=(0, 200)))
    assert [image.name for image in images] == ["a/001.png", "a/002.png"]
    wanted = np.round(np.clip(shown(values, 2, 1), 0, 200) * (255 / 200))
    assert np.array_equal(images[0].image, wanted)
    some = [image.name for image in read(Download(folder), 0, 0.5)]
    assert some == [image.name for image in read(Download(folder), 0, 0.5)]
    assert len(list(read(Download(folder), 0, 0))) < len(some) < len(list(read(Download(folder), 0, 1)))
    download = Download(folder)
    assert not list(read(download, window=(5, 5))) and "no range" in str(dict(download.skipped))


@pytest.mark.parametrize(
    "image, mask, case",
    [
        ("images/a.nii.gz", "masks/a.nii.gz", "a"),
        ("imagesTr/p1/a.nii.gz", "labelsTr/p1/a.nii.gz", "p1/a"),
        ("train/images/a.nii.gz", "train/labels/a.nii", "train/a"),
        ("a.nii.gz", "a_seg.nii.gz", "a"),
        ("all/a-image.nii.gz", "all/a-mask.nii.gz", "all/a"),
        ("p1/image.nii.gz", "p1/seg.nii.gz", "p1"),
        ("images/a.nii.gz", "labels/a_gt.nii.gz", "a"),
        ("img.nii.gz", "segmentation.nii.gz", "case"),
    ],
)
def test_layouts(write, image, mask, case):
    download = Download(write((image, mask)))
    assert [image.name for image in read(download, keep_empty=0)] == [f"{case}/001.png", f"{case}/002.png"]
    assert [len(names) for names in download.skipped.values()] == [3], "slices without a class"


def test_classes_without_names(write, capsys):
    folder = write(("a_img.nii.gz", "a_seg.nii.gz"), ("b_img.nii.gz", "b_seg.nii.gz"), names=False)
    words = [image.masks.keys() for image in read(Download(folder), keep_empty=0)]
    assert words == [{"class1", "class2"}, {"class2"}] * 2
    assert capsys.readouterr().err.count("No dataset.json") <= 1


def test_bad_cases_cost_themselves_alone(write):
    folder = write(*[(f"images/{c}.nii.gz", f"labels/{c}.nii.gz") for c in "abcdefgh"])
    values, labels = body()
    write_nifti(folder / "labels/b.nii.gz", labels[:, :, 1:])
    moved = affine()
    moved[0, 3] += 0.4
    write_nifti(folder / "labels/c.nii.gz", labels, moved)
    write_nifti(folder / "images/d.nii.gz", np.stack([values, values], 3))
    write_nifti(folder / "images/e.nii.gz", np.where(labels == 1, np.nan, values).astype(np.float32))
    write_nifti(folder / "labels/f.nii.gz", labels * np.float32(0.5))
    write_nifti(folder / "labels/g.nii.gz", labels * np.uint8(3))
    data = (folder / "images/h.nii.gz").read_bytes()
    (folder / "images/h.nii.gz").write_bytes(data[: len(data) // 2])
    (folder / "images/lone.nii.gz").write_bytes(data)
    download = Download(folder)
    names = {image.name.split("/")[0] for image in read(download, keep_empty=0)}
    assert names == {"a"}
    reasons = {name: reason for reason, hits in download.skipped.items() for name in hits}
    for case, reason in dict(
        b="(9, 7, 5) voxels, its labels (9, 7, 4)", c="lie 0.4 mm apart", d="no volume, or several",
        e="NaN", f="other than class numbers", g="numbers [3, 6]", h="Compressed file ended",
    ).items():  # fmt: skip
        assert reason in reasons[f"images/{case}.nii.gz, labels/{case}.nii.gz"]
    assert reasons["images/lone.nii.gz"] == "image without mask"


def test_that_volumes_are_scaled_by_themselves_is_said_once(write, capsys, monkeypatch):
    monkeypatch.setattr("vlsm.system.console._printed", set())
    folder = write(("images/a.nii.gz", "labels/a.nii.gz"), ("images/b.nii.gz", "labels/b.nii.gz"))
    list(read(Download(folder), window=(0, 100)))
    assert "--window" not in capsys.readouterr().err
    list(read(Download(folder)))
    assert capsys.readouterr().err.count("Without --window LOW HIGH each volume is scaled by itself") == 1
