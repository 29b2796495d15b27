"""Valid inputs of every reader, made from small arrays by this program and its packages, and how each is read.

`KINDS` maps a name to a function that returns a `Kind`. Nothing here is anybody else's data.
"""

import contextlib
import importlib
import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import datasets
from tests.raw.layouts import LAYOUTS, Layout
from tests.raw.volumes import body, write_nifti
from vlsm.checkpoint import load, read_metadata, read_tuned, run_settings
from vlsm.data.check import inspect_splits, sheet_rows, similar_splits
from vlsm.data.images import ImageError, mask_colour, orientation, read_image, read_labels, read_mask
from vlsm.data.judge import judge_masks
from vlsm.data.records import Record
from vlsm.data.resize import least_side, resize_image, resize_mask
from vlsm.model import read_network
from vlsm.networks.tokenizer import Tokenizer
from vlsm.networks.weights import MINI, image_side, load_safely
from vlsm.raw.formats.colours import parse_classes
from vlsm.raw.formats.importing import import_dataset
from vlsm.raw.prepare import prepare, read_descriptions
from vlsm.results.figures import fit, outline, overlay
from vlsm.results.tables import format_rows
from vlsm.system.console import friendly_errors
from vlsm.system.schema import read_json
from vlsm.tools import report
from vlsm.training.arguments import parse_arguments
from vlsm.training.run import Run

SIZE = (20, 28)  # height and width of the pictures
SIDE = 32  # of a network's images


@dataclass
class Kind:
    """A kind of input. variants: each {name of a file: its bytes}, of which some are mutated.

    read: reads the files of a folder. allowed: what it may raise. words: of the variants, command lines
    [program, *words], which are mutated as well. seconds: after so many a case ends as if it were done.
    """

    variants: list
    read: object
    allowed: tuple = (ValueError, OSError)
    words: list = field(default_factory=list)
    seconds: float = 0


def blob(seed=0):
    """A mask bool `[H, W]` with one ragged piece."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.hypot(y - 9 - seed % 3, x - 13 + seed % 5) < 6


def picture(seed=0):
    """Pixels uint8 `[H, W, 3]` in which the blob is bright."""
    pixels = np.random.default_rng(seed).integers(0, 90, (*SIZE, 3)).astype(np.uint8)
    pixels[blob(seed)] = (220, 60, 50)
    return pixels


def encode(image, file_format, **options):
    """Return the bytes of an array, or of a Pillow image, in a format."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


def png(pixels):
    return encode(pixels, "PNG")


def text(value):
    """Return the bytes of a value in JSON, or of a text."""
    return (value if isinstance(value, str) else json.dumps(value, indent=1)).encode()


def zipped(files):
    """Return the bytes of a zip archive of files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


# Pictures


def exif(turn):
    tags = Image.Exif()
    tags[0x0112] = turn
    return tags


def palette(numbers):
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette(bytes([0, 0, 0, 128, 0, 0, 0, 128, 0]))
    return image


def pngs():
    mask = blob().astype(np.uint8)
    deep = picture()[..., 0].astype(np.uint16) * 257
    pictures = [picture(), mask * 255, mask, deep, palette(mask), Image.fromarray(mask * 255).convert("1")]
    pictures += [np.dstack([picture(), mask * 255]), np.dstack([mask * 200, mask * 255])]
    return [{"x.png": png(pixels)} for pixels in pictures] + [
        {"x.png": encode(picture(), "PNG", exif=exif(6))}
    ]


def tiffs():
    import tifffile

    mask = blob().astype(np.uint8) * 255
    grey = picture()[..., 0]
    files = [encode(pixels, "TIFF") for pixels in (picture(), mask, grey.astype(np.uint16) * 9)]
    files += [encode(picture(), "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate")]
    files += [encode(grey.astype(kind), "TIFF") for kind in (np.int32, np.float32)]
    files.append(encode(Image.fromarray(mask).convert("1"), "TIFF", compression="group4"))
    for pixels, options in (
        (picture().transpose(2, 0, 1).copy(), dict(photometric="rgb", planarconfig="separate")),
        (grey, dict(tile=(16, 16), bigtiff=True)),
        (grey, dict(byteorder=">", compression="zlib", predictor=True)),
        (np.stack([grey, grey]), dict(photometric="minisblack")),
    ):
        data = io.BytesIO()
        tifffile.imwrite(data, pixels, **options)
        files.append(data.getvalue())
    return [{"x.tif": data} for data in files]


def jpegs():
    cmyk = Image.fromarray(picture()).convert("CMYK")
    files = [encode(picture(), "JPEG", exif=exif(turn)) for turn in (1, 6, 5)]
    files += [encode(cmyk, "JPEG"), encode(blob().astype(np.uint8) * 255, "JPEG", quality=95)]
    return [{"x.jpg": data} for data in [*files, encode(picture(), "JPEG", progressive=True)]]


def other_pictures():
    frames = [Image.fromarray(picture(k)).convert("P") for k in range(2)]
    return [
        {"x.bmp": encode(picture(), "BMP")},
        {"x.bmp": encode(palette(blob()), "BMP")},
        {"x.webp": encode(picture(), "WEBP", lossless=True, exif=exif(6))},
        {"x.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:])},
        {"x.jp2": encode(picture(), "JPEG2000")},
        {"x.jp2": encode(picture()[..., 0].astype(np.uint16) * 257, "JPEG2000")},
        {"x.ppm": encode(picture(), "PPM")},
        {"x.pgm": encode(picture()[..., 0], "PPM")},
        {"x.pgm": b"P2\n3 2\n255\n0 1 2\n3 4 255\n"},
    ]


def read_picture(folder):
    """Read a picture in every way; raise a refusal if all refuse it."""
    [path] = folder.iterdir()
    orientation(path)
    judge(path)
    refusals = []
    readers = (use_image, use_mask, read_labels, mask_colour)
    for reader in readers:
        try:
            reader(path)
        except (ImageError, FileNotFoundError) as error:
            refusals.append(error)
    if len(refusals) == len(readers):
        raise refusals[0]


def use_image(path):
    image = read_image(path)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size, image.shape
    assert resize_image(image, SIDE).shape == (SIDE, SIDE, 3)
    width, height = fit(*image.shape[:2])
    assert 0 < width < 10 and 0 < height < 10


def use_mask(path):
    mask = read_mask(path)
    assert mask.dtype == bool and mask.ndim == 2 and mask.size, (mask.dtype, mask.shape)
    assert resize_mask(mask, SIDE).any() == mask.any()
    least_side(mask)
    if mask.size < 1e6:
        overlay(np.zeros((*mask.shape, 3), np.uint8), mask, (1, 2, 3))
        assert not (outline(mask) & ~mask).any()


def judge(path):
    """Judge two records of one file together, as those of a data set are; ValueError is a sentence."""
    with contextlib.suppress(ValueError):
        judge_masks([Record("x", "x", path, path), Record("y", "y", path, path)])


def pictures(variants):
    return lambda: Kind(variants(), read_picture, (ImageError, FileNotFoundError))


# Folders of one's own, and annotation files


def pairs(names, images="images", masks="masks", mask=lambda k: blob(k).astype(np.uint8) * 255):
    files = {}
    for k, name in enumerate(names):
        files[f"set/{images}/{name}.png"] = png(picture(k))
        files[f"set/{masks}/{name}.png"] = png(mask(k))
    return files


def class_map(k):
    numbers = blob(k).astype(np.uint8)
    numbers[:3, :3] = 2
    numbers[-2:] = 255
    return numbers


LABELS = {
    "labels": {"background": 0, "liver": 1, "tumour": 2, "ignore": 255},
    "prompts": {"liver": ["a liver", "the liver"], "tumour": "a tumour"},
    "spacing": {"a": [0.5, 0.7], "b.png": [1, 1]},
    "group": r"^\w",
    "name": "x",
}
PROMPTS = {"p0": "", "p1": "disk", "p2": "red disk", "p3": ["one red disk", "a red disk"]}


def entries(names):
    rows = []
    for name in names:
        rows.append(dict(img_name=f"{name}.png", mask_name=f"{name}.png", prompts=PROMPTS, bbox=[1, 2, 3, 4]))
    return rows


def annotated():
    files = pairs(["a", "b", "c"])
    for split, name in zip(("train", "val", "test"), "abc"):
        files[f"set/anns/{split}.json"] = text(entries([name]))
    return files


def folders():
    own = [f"{patient}{n}" for patient in "ab" for n in range(4)]
    split = {}
    for part in ("train", "val", "test"):
        split |= pairs(["a"], f"{part}/images", f"{part}/masks")
    listed = pairs(own) | {
        "set/train.txt": b"a0\na1\na2\nb0\nb1\n",
        "set/val.txt": b"b2.png\n",
        "set/test.txt": b"b3\n",
    }
    return [
        pairs(own, mask=class_map) | {"set/dataset.json": text(LABELS)},
        pairs(own, mask=class_map) | {"set/dataset.json": text(LABELS | {"spacing": [0.5, 0.7]})},
        split,
        listed,
        pairs(own, masks="masks/liver") | pairs(own, masks="masks/cyst"),
        annotated(),
    ]


def read_dataset(folder):
    """Read, check and decode a data set as train.py and --check do."""
    splits = datasets.read_splits(str(folder / "set"))
    summaries = inspect_splits(splits)
    similar_splits(summaries)
    sheet_rows(splits)
    cache = str(folder / "cache")
    datasets.open_dataset(str(folder / "set"), list(splits), SIDE, "", cache, prompts="a disk", skip_bad=True)


def data_sets():
    return Kind(folders(), read_dataset)


def only(names, variants, read):
    """A kind whose files of these endings alone are mutated."""
    return Kind([{"!": names, **files} for files in variants], read)


def json_files():
    labelled = [files for files in folders() if "set/dataset.json" in files]
    return only((".json", ".txt"), [*labelled, annotated(), folders()[3]], read_dataset)


# Formats of other programs


def coco_files():
    square = [[3.0, 3.0, 15.0, 3.0, 15.0, 12.0, 3.0, 12.0]]
    runs = dict(size=list(SIZE), counts=[100, 60, SIZE[0] * SIZE[1] - 160])
    annotations = [
        dict(id=1, image_id=1, category_id=1, segmentation=square, bbox=[3, 3, 12, 9]),
        dict(id=2, image_id=2, category_id=2, segmentation=runs),
        dict(id=3, image_id=2, category_id=1, segmentation=compressed()),
    ]
    images = [dict(id=k, file_name=f"train/{k}.png", height=SIZE[0], width=SIZE[1]) for k in (1, 2, 3)]
    categories = [dict(id=1, name="polyp"), dict(id=2, name="tool")]
    content = dict(info={}, images=images, annotations=annotations, categories=categories)
    files = {f"images/train/{k}.png": png(picture(k)) for k in (1, 2, 3)}
    return files | {"annotations/instances_train.json": text(content)}


def compressed():
    """A mask in COCO's compressed run lengths."""
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(blob().astype(np.uint8)))
    return dict(size=list(SIZE), counts=encoded["counts"].decode())


def labelme_files():
    shapes = [
        dict(label="polyp", points=[[3, 3], [15, 3], [9, 12]], shape_type="polygon", flags={}),
        dict(label="tool", points=[[3, 3], [9, 9]], shape_type="rectangle", group_id=None),
        dict(label="tool", points=[[15, 9], [18, 9]], shape_type="circle"),
    ]
    files = {}
    for stem in "ab":
        content = dict(
            version="5.5.0",
            shapes=shapes,
            imagePath=f"{stem}.png",
            imageData=None,
            imageHeight=SIZE[0],
            imageWidth=SIZE[1],
        )
        files |= {f"{stem}.png": png(picture()), f"{stem}.json": text(content)}
    return files


def yolo_files():
    files = {"data.yaml": b"path: .\ntrain: images/train\nnc: 2\nnames:\n  0: polyp\n  1: tool\n"}
    for k in range(3):
        lines = "0 0.1 0.1 0.6 0.1 0.6 0.8 0.1 0.7\n1 0.5 0.5 0.9 0.5 0.7 0.9\n"
        files |= {f"images/train/{k}.png": png(picture(k)), f"labels/train/{k}.txt": text(lines)}
    return files


def cvat_files():
    colours = picture() * 0
    colours[blob()] = (250, 50, 83)
    lines = "# label:color_rgb:parts:actions\nbackground:0,0,0::\npolyp:250,50,83::\ntool:51,221,255:tip:\n"
    files = {"labelmap.txt": text(lines), "ImageSets/Segmentation/train.txt": b"a\nb\n"}
    for stem in "ab":
        files |= {
            f"JPEGImages/{stem}.jpg": encode(picture(), "JPEG"),
            f"SegmentationClass/{stem}.png": png(colours),
        }
    return files


def label_studio_files():
    def region(kind, word, **value):
        return dict(
            id="r",
            type=kind,
            value={**value, kind: [word]},
            original_height=SIZE[0],
            original_width=SIZE[1],
            image_rotation=0,
        )

    results = [
        region("polygonlabels", "polyp", points=[[10, 10], [60, 10], [40, 70]]),
        region("brushlabels", "tool", format="rle", rle=brush()),
    ]
    annotation = dict(id=1, result=results, was_cancelled=False)
    tasks = []
    for number, name in enumerate(("a.png", "b.png")):
        address = f"/data/upload/1/0123abcd-{name}"
        tasks.append(dict(id=number, data={"image": address}, annotations=[annotation]))
    return {"a.png": png(picture(1)), "b.png": png(picture(2)), "export.json": text(tasks)}


def brush():
    """Run lengths of RGBA in Label Studio's brush, in which all values of the blob are 255."""
    values = np.repeat(blob().astype(np.uint8) * 255, 4)
    bits = f"{len(values):032b}" + "00111" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    edges = [0, *(np.flatnonzero(np.diff(values.astype(int))) + 1).tolist(), len(values)]
    for start, end in zip(edges, edges[1:]):
        bits += "1" + "11" + f"{end - start - 1:016b}" + f"{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def written(write):
    """Return the files that a function writes into a folder."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        files = {}
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def nifti_files():
    def write(folder):
        values, labels = body()
        for ending in ("nii", "nii.gz"):
            write_nifti(folder / f"images/a.{ending}", values, orientation="LPS")
            write_nifti(folder / f"labels/a.{ending}", labels)
            (folder / f"images/a.{ending}").rename(folder / f"images/{ending[-1]}.{ending}")
            (folder / f"labels/a.{ending}").rename(folder / f"labels/{ending[-1]}.{ending}")

    return written(write)


def nnunet_files():
    names = {"labels": {"background": 0, "liver": 1, "organ": [1, 2]}, "file_ending": ".nii.gz"}
    files = {"dataset.json": text(names)}
    for name, data in nifti_files().items():
        folder, _, file = name.partition("/")
        stem, _, ending = file.partition(".")
        channel = "_0000" if folder == "images" else ""
        files[f"{folder}Tr/c{stem}{channel}.{ending}"] = data
    files["imagesTr/d_0000.png"] = png(picture())
    files["labelsTr/d.png"] = png(blob().astype(np.uint8) * 2)
    return files


def dicom_files():
    from tests.raw.test_import_dicom import write_series

    def write(folder):
        write_series(folder / "s")
        write_nifti(folder / "s/seg.nii.gz", body()[1])

    return written(write)


def colour_files():
    colours = picture() * 0
    colours[blob()] = (255, 0, 0)
    files = {}
    for stem in "ab":
        files |= {f"images/{stem}.png": png(picture()), f"masks/{stem}.png": png(colours)}
    return files


IMPORTS = {
    "coco": coco_files,
    "labelme": labelme_files,
    "yolo": yolo_files,
    "cvat": cvat_files,
    "label-studio": label_studio_files,
    "nnunet": nnunet_files,
    "nifti": nifti_files,
    "dicom": dicom_files,
    "masks-from-colours": colour_files,
}


def below(folder, files):
    """Return files with a folder before their names."""
    return {f"{folder}/{name}": data for name, data in files.items()}


def import_kind(name):
    files = IMPORTS[name]()
    options = {"classes": parse_classes("polyp=255,0,0")} if name == "masks-from-colours" else {}

    def read(folder):
        [source] = folder.iterdir()
        import_dataset(name, source, folder / "out", **options)

    variants = [below("src", files), below("src", files), {"src.zip": zipped(files)}]
    return Kind(variants, read)


def preparations():
    variants = []
    for name, layout in LAYOUTS.items():
        download = Layout()
        layout(download)
        variants += [below(f"{name}", download.files), {f"{name}.zip": zipped(download.files)}]

    def read(folder):
        [source] = folder.iterdir()
        prepare(source.stem, source, folder / "out")

    return Kind(variants, read)


# A run's files


def trained():
    """Return the files of a small run in `run`, its data set in `set`, made by the programs themselves."""
    import evaluate
    import train

    def write(folder):
        for name, data in annotated().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        here = Path.cwd()
        os.chdir(folder)
        try:
            for seed in (1, 2):
                train.main([*TRAIN, "--epochs", "1", "--seed", str(seed), "--out", f"runs/seed{seed}"])
                evaluate.main(["--ckpt", f"runs/seed{seed}"])
        finally:
            os.chdir(here)

    return written(write)


TRAIN = (
    "--dataset set --weights mini --prompts disk --dim 4 --batch-size 2 --image-size 32 --min-epochs 1 "
    "--cache-dir cache --cache-gb 0"
).split()


def checkpoints(run):
    base = load_base()

    def read(folder):
        path = folder / "best.safetensors"
        run_settings(read_metadata(path))
        read_tuned(path)
        load(path, weights="mini", base=base)

    return Kind([{"best.safetensors": run["runs/seed1/best.safetensors"]}], read)


def load_base():
    import vlsm

    return vlsm.build("clipseg", weights="mini", method="none")


def states(run):
    import train  # noqa: F401

    def read(folder):
        model = load(folder / "best.safetensors", weights="mini", base=base)
        tuned = list(model.tuned_parameters().values())
        optimizer = torch.optim.AdamW(tuned, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        resumed = Run(folder, model, optimizer, scheduler, None, {})
        resumed.resume()
        resumed.describe_best()
        assert isinstance(resumed.next_epoch, int)

    base = load_base()
    files = {
        "!": ("state.pt",),
        "state.pt": run["runs/seed1/state.pt"],
        "best.safetensors": run["runs/seed1/best.safetensors"],
    }
    return Kind([files], read)


def configs(run):
    def read(folder):
        parse_arguments(["--resume", "--out", str(folder)])

    return Kind([{"config.json": run["runs/seed1/config.json"]}], read)


def results(run):
    files = {name: data for name, data in run.items() if name.startswith("runs/")}
    files["!"] = ("metrics.json", "metrics.csv", "paper.json")
    rows = [dict(dataset="set", method="dense vl 4", trained=9, dsc=81.0, hd95=3)]
    files["paper.json"] = text(dict(source="A paper", rows=rows))

    def read(folder):
        groups, counts = report.group_seeds(report.collect(folder / "runs"))
        table = report.tabulate(groups)
        source = report.add_published(table, counts, str(folder / "paper.json"))
        for file_format in ("md", "csv", "tex"):
            format_rows(report.table_rows(table, counts), file_format, [source])

    return Kind([files], read)


def spaces():
    import optuna

    from vlsm.training.space import make_distributions

    space = {
        "lr": {"low": 1e-5, "high": 5e-3, "log": True},
        "dim": [16, 64],
        "dims": [[8, 16, 32], [32, 16, 8]],
        "batch_size": {"low": 2, "high": 8},
    }

    def read(folder):
        distributions = make_distributions(optuna, read_json(folder / "space.json"), folder / "space.json")
        read_descriptions(folder / "texts.json")
        assert distributions

    return Kind([{"space.json": text(space), "texts.json": text(["an abnormal growth", "x"])}], read)


def bases():
    names = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "model.safetensors")
    files = {}
    for name in names:
        if (MINI / name).is_file():
            files[name] = (MINI / name).read_bytes()
    files.setdefault("preprocessor_config.json", text(dict(size=dict(height=64, width=64))))
    files["!"] = tuple(name for name in files if name != "vocab.json")

    def read(folder):
        network, _ = read_network("clipseg", str(folder))
        image_side(network.config, folder)
        Tokenizer(folder)(["a polyp", ""])

    return Kind([files], read)


def tokenizers():
    files = {name: (MINI / name).read_bytes() for name in ("vocab.json", "merges.txt")}

    def read(folder):
        Tokenizer(folder)(["a polyp", "", "é" * 9])

    return Kind([files], read)


def pickles():
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.float16)}
    variants = []
    for old in (False, True):
        data = io.BytesIO()
        torch.save(dict(state=tensors, epoch=3), data, _use_new_zipfile_serialization=not old)
        variants.append({"x.pt": data.getvalue()})
    return Kind(variants, lambda folder: load_safely(folder / "x.pt"))


# Command lines


def command_lines(run):
    """Every program with the words of README's and --help's examples, on a run and a data set that exist."""
    tools = "vlsm.tools."
    lines = [
        ["train", *TRAIN, "--epochs", "1", "--out", "out"],
        ["train", *TRAIN, "--dry-run", "--peft", "dense", "--lr", "0.001", "--negatives", "1"],
        ["train", "--out", "runs/seed1", "--resume", "--epochs", "2"],
        ["train", *TRAIN, "--peft", "dense+vpt", "--dry-run", "--group", "^.", "--fold", "1/2"],
        ["evaluate", "--ckpt", "runs/seed1", "--out", "out", "--nsd-tolerance", "2", "--spacing", "1", "2"],
        ["evaluate", "--ckpt", "runs/seed1", "runs/seed2", "--ensemble", "--mirror", "--batch-size", "2"],
        [
            "evaluate",
            "--ckpt",
            "runs/seed1",
            "--images",
            "set/images",
            "--prompt",
            "a disk",
            "--save-masks",
            "m",
        ],
        [
            "evaluate",
            "--ckpt",
            "runs",
            "--all-prompts",
            "--split",
            "val",
            "--keep-largest",
            "--min-area",
            "3",
        ],
        ["datasets", "--check", "set", "--out", "check.png"],
        ["datasets", "--list"],
        ["datasets", "--import", "labelme", "labelled", "--out", "out", "--templates"],
        ["datasets", "--prepare", "kvasir", "--src", "set", "--data-root", "data"],
        [f"{tools}report", "runs", "--format", "tex", "--published", "vlsm-adapter", "--out", "tables"],
        [f"{tools}compare", "runs/seed1", "runs/seed2", "--figure", "2", "--out", "compare.png"],
        [f"{tools}score", "set/masks", "set/masks", "--out", "scores", "--nsd-tolerance", "3"],
        [f"{tools}audit", "runs/seed1", "--split", "test"],
        [f"{tools}risk", "runs/seed1", "fn", "0.6"],
        [f"{tools}merge", "runs/seed1", "out"],
        [f"{tools}export", "runs/seed1", "--prompt", "disk", "--out", "x.onnx"],
        [f"{tools}repeat", "--seeds", "1", "2", "--out", "group", "--", *TRAIN, "--epochs", "1"],
        [f"{tools}sweep", "--out", "sweep", "--trials", "1", "--", *TRAIN, "--epochs", "1", "--lr", "0.01"],
        [f"{tools}push", "runs/seed1", "owner/name"],
        [f"{tools}convert_cris", "runs/seed1/state.pt", "cris"],
    ]
    files = {"!": ()} | {name: data for name, data in run.items() if not name.startswith("cache/")}
    files |= below("labelled", labelme_files())
    return Kind([files], run_program, (Refused,), lines, 8)


def run_program(folder, words):
    """Run a program in this process, as its command line does. Raises what no sentence came of."""
    main = importlib.import_module(words[0]).main
    try:
        with friendly_errors():
            main(words[1:])
    except SystemExit as stop:
        if stop.code not in (None, 0, 2):
            raise AssertionError(f"exit code {stop.code}") from stop
        if stop.code == 2:
            raise Refused from stop


class Refused(ValueError):
    """A command line that a sentence answered."""


KINDS = {
    "png": pictures(pngs),
    "tiff": pictures(tiffs),
    "jpeg": pictures(jpegs),
    "pictures": pictures(other_pictures),
    "dataset": data_sets,
    "json": json_files,
    **{name: partial(import_kind, name) for name in IMPORTS},
    "prepare": preparations,
    "checkpoint": checkpoints,
    "state": states,
    "config": configs,
    "results": results,
    "space": spaces,
    "base": bases,
    "tokenizer": tokenizers,
    "pickle": pickles,
    "commands": command_lines,
}
OF_A_RUN = ("checkpoint", "state", "config", "results", "commands")  # kinds that need a trained run
# Kinds and the packages without which they cannot be made
NEEDS = {
    "tiff": ("tifffile",),
    "coco": ("pycocotools",),
    "prepare": ("pycocotools",),
    "nnunet": ("nibabel",),
    "nifti": ("nibabel",),
    "dicom": ("nibabel", "pydicom"),
    "space": ("optuna",),
    "commands": ("optuna",),
}
