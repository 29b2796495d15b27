"""Every key of every file that is read, left out or with a value of another type: a sentence, never a traceback."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import datasets
import vlsm
from tests.conftest import ROOT, disk, write_pair
from vlsm.checkpoint import load, read_metadata, run_settings
from vlsm.data.classes import add_spacing, find_group, find_labels, read_dataset_json
from vlsm.data.records import read_annotations
from vlsm.networks.weights import image_side
from vlsm.segment import prompt_notice
from vlsm.system.console import friendly_errors
from vlsm.tools import repeat, report, sweep
from vlsm.training.arguments import parse_arguments
from vlsm.training.run import Run, check_folder, check_stamps
from vlsm.training.space import make_distributions

SIDE = 32
GONE = object()
# 1e400 is Infinity once it is read
WRONG = [
    GONE,
    None,
    True,
    -1,
    1.5,
    math.inf,
    math.nan,
    "x",
    "(",
    "",
    "\0",
    [],
    {},
    [None],
    {"x": None},
    10**400,
]
ROW = dict(
    epoch=1, train_loss=1.0, train_dsc=0.5, val_loss=1.0, val_dsc=0.5, val_iou=0.4, val_alarms=0.5, lr=1e-3,
    seconds=1.0, images_per_second=9.0,
)  # fmt: skip


# Keys whose items are not of a type of their own, but compared with what the run has
COMPARED = (
    "records",
    "contents",
    "tuned",
    "optimizer",
    "scheduler",
    "scaler",
    "rng",
    "options",
    "model_type",
    "size",
)


def places(content, keys=()):
    """Yield path and value of each key in nested dictionaries and lists."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = list(enumerate(content))[:2]
    else:
        return
    for key, value in items:
        yield (*keys, key), value
        yield from places(value, (*keys, key))


def changed(content, keys, value):
    """Return a copy of nested dictionaries and lists with another value in a place, or without it."""
    content = copy.deepcopy(content)
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    if value is GONE:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    return content


def outcome(capsys, name, keys, before, value, read, content):
    """Read a content; return what is wrong with how that ends, or None.

    What has the right type, is COMPARED or may be missing can be refused later, in a sentence on what it means.
    """
    capsys.readouterr()
    try:
        with friendly_errors():
            read(content)
        return None
    except SystemExit as stop:
        said = capsys.readouterr().err
        named = [str(key) for key in keys if isinstance(key, str)]
        named += [f"--{key.replace('_', '-')}" for key in named]
        known = name in said and (not named or any(key in said for key in named))
        later = keys[0] in COMPARED or value in (GONE, None) or type(value) is type(before)
        later = later or before is None and isinstance(value, str)
        if stop.code != 2 or not known and not later:
            return f"names neither file nor key: {said[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"


@pytest.fixture(scope="module")
def base():
    return vlsm.build("clipseg", "mini")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small data set and the run on it."""
    home = tmp_path_factory.mktemp("schema")
    return home


@pytest.fixture
def trained(home, cli, monkeypatch):
    """A run of one epoch, trained once."""
    import numpy as np

    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    run = home / "run"
    if not run.exists():
        rng = np.random.default_rng(0)
        for i in range(12):
            write_pair(home / "set", f"d{i}", *disk(rng, SIDE, SIDE))
        options = ["--weights", "mini", "--prompts", "disk", "--dim", 4, "--image-size", SIDE, "--epochs", 1]
        options += ["--dataset", home / "set", "--batch-size", 4, "--min-epochs", 1]
        assert cli("train", *options, "--out", run)[0] == 0
        assert cli("evaluate", "--ckpt", run)[0] == 0
    return run


def metadata_case(home, trained, base):
    file = trained / "best.safetensors"
    with safe_open(file, "pt") as opened:
        content = {name: json.loads(text) for name, text in opened.metadata().items() if name != "digest"}
    tensors = load_file(file)
    target = home / "changed.safetensors"

    def read(content):
        texts = {name: json.dumps(value) for name, value in content.items()}
        save_file(tensors, target, texts)
        metadata = read_metadata(target)
        run_settings(metadata)
        model = load(target, base=base)
        image_side(model.network.config, Path(model.info["folder"]), metadata["image_size"])
        prompt_notice(metadata, ["a polyp"])
        model.predict(np_image(), "disk")
        datasets.open_run_split(metadata)

    return target, content, read


def np_image():
    import numpy as np

    return np.zeros((8, 8, 3), np.uint8)


def config_case(home, trained, base):
    run = home / "resumed"
    shutil.copytree(trained, run, dirs_exist_ok=True)
    file = run / "config.json"
    content = json.loads(file.read_text())

    def read(content):
        file.write_text(json.dumps(content))
        check_folder(run, True, False)
        parse_arguments(["--out", str(run), "--resume"])
        check_stamps(run, json.loads((trained / "config.json").read_text()))

    return file, content, read


def sweep_case(home, trained, base):
    pytest.importorskip("optuna")
    out = home / "sweep"
    file = out / "config.json"
    out.mkdir(exist_ok=True)
    space = dict(lr=dict(low=1e-5, high=1e-3, log=True), dim=[4, 8], dims=[[4, 4, 4]], ce=["logits"])
    content = dict(arguments=["--dataset", str(home / "set"), "--peft=dense", "--weights=mini"], space=space)

    def read(content):
        file.write_text(json.dumps(content))
        sweep.main(["--out", str(out), "--resume"])

    return file, content, read


def space_case(home, trained, base):
    pytest.importorskip("optuna")
    _, content, _ = sweep_case(home, trained, base)
    file = home / "space.json"
    words = ["--out", str(home / "new"), "--space", str(file), "--", *content["arguments"]]

    def read(content):
        shutil.rmtree(home / "new", ignore_errors=True)
        file.write_text(json.dumps(content))
        sweep.main(words)

    return file, content["space"], read


def group_case(home, trained, base):
    group = home / "group"
    group.mkdir(exist_ok=True)
    file = group / "config.json"

    def read(content):
        file.write_text(json.dumps(content))
        repeat.main(["--out", str(group), "--resume", "--seeds", "1"])

    return file, dict(arguments=["--dataset", str(home / "set"), "--weights=mini"]), read


def state_case(home, trained, base):
    out = home / "state"
    out.mkdir(exist_ok=True)
    file = out / "state.pt"
    model = load(trained, base=base)

    def new_run():
        optimizer = torch.optim.AdamW(model.tuned_parameters().values(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return Run(out, model, optimizer, scheduler, None, {})

    def read(content):
        torch.save(content, file)
        run = new_run()
        run.resume()
        run.times = [0.0, 1.0]
        run.end_epoch(**ROW)
        assert run.describe_best() and run.describe_epoch(3)

    first = new_run()
    for parameter in model.tuned_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    first.optimizer.step()
    first.end_epoch(**ROW)
    content = first.state()
    states = content["optimizer"]["state"]
    for index in list(states)[2:]:
        del states[index]
    content["optimizer"]["param_groups"][0]["betas"] = [0.9, 0.999]
    return file, content, read


def dataset_case(home, trained, base):
    import numpy as np
    from PIL import Image

    root = home / "labels"
    file = root / "dataset.json"
    for part, name in (("images", "a.png"), ("images", "b.png"), ("masks", "a.png"), ("masks", "b.png")):
        (root / part).mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((8, 8), np.uint8)
        pixels[2:5] = part == "masks"
        Image.fromarray(pixels).save(root / part / name)
    labels = {"background": 0, "liver": 1, "ignore": 255}
    content = dict(labels=labels, prompts={"liver": ["a liver", "liver"]}, spacing=[0.5, 0.5], group="a|b")

    def read(content):
        file.write_text(json.dumps(content))
        datasets.open_dataset(str(root), ["train"], SIDE, cache_dir=str(home / "cache"), prompts="random")

    return file, content, read


def spacing_case(home, trained, base):
    file, content, read = dataset_case(home, trained, base)
    return file, dict(labels=content["labels"], spacing={"a.png": [0.5, 0.5]}), read


def annotations_case(home, trained, base):
    root = home / "annotated"
    file = root / "anns" / "train.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    for part in ("images", "masks"):
        shutil.copytree(home / "set" / part, root / part, dirs_exist_ok=True)
    prompts = {"p0": "", "p1": "disk", "p2": ["one", "two"]}
    content = [dict(img_name=f"d{i}.png", mask_name=f"d{i}.png", prompts=prompts) for i in range(2)]

    def read(content):
        file.write_text(json.dumps(content))
        datasets.open_dataset(str(root), ["train"], SIDE, cache_dir=str(home / "cache"), prompts="random")

    return file, content, read


def metrics_case(home, trained, base):
    file = home / "reported" / "run" / "eval-test" / "metrics.json"
    shutil.copytree(trained, home / "reported" / "run", dirs_exist_ok=True)
    content = json.loads(file.read_text())
    summary = {name: content[name] for name in ("dsc", "iou", "hd95", "nsd")}
    content["classes"] = dict(each={"disk": summary})
    content["alarms"] = {"absent": content["dsc"]}
    content["ensemble"] = None

    def read(content):
        file.write_text(json.dumps(content))
        groups, trained = report.group_seeds(report.collect(home / "reported"))
        report.table_rows(report.tabulate(groups), trained)

    return file, content, read


def weights_case(home, trained, base):
    return _weights_case(home, "config.json")


def processor_case(home, trained, base):
    return _weights_case(home, "preprocessor_config.json")


def _weights_case(home, name):
    folder = home / "weights"
    shutil.copytree(ROOT / "vlsm" / "mini", folder, dirs_exist_ok=True)
    for pattern in ("*.py", "*.png", "*.ipynb"):
        for other in folder.glob(pattern):
            other.unlink()
    file = folder / name
    original = json.loads((ROOT / "vlsm" / "mini" / name).read_text())

    def read(content):
        file.write_text(json.dumps(content))
        model = vlsm.build("clipseg", folder)
        model.predict(np_image(), "disk")
        file.write_text(json.dumps(original))

    return file, original, read


CASES = [
    metadata_case, config_case, sweep_case, space_case, group_case, state_case, dataset_case, spacing_case,
    annotations_case, metrics_case, weights_case, processor_case,
]  # fmt: skip


def run_case(case, step, home, trained, base, capsys, monkeypatch):
    """Read every `step`-th variant of a file; return what is wrong with each."""
    monkeypatch.setattr("train.main", lambda words, *_: parse_arguments(words))
    if case in (sweep_case, space_case):
        monkeypatch.setattr(sweep, "open_study", lambda *_, **__: None)
        monkeypatch.setattr(sweep, "next_trial", lambda *_: None)
        monkeypatch.setattr(sweep, "report", lambda *_: None)
    file, content, read = case(home, trained, base)
    read(copy.deepcopy(content))  # the file as it should be
    wrong = []
    attacks = [(keys, before, value) for keys, before in places(content) for value in WRONG][::step]
    for keys, before, value in attacks:
        other = changed(content, keys, value)
        problem = outcome(capsys, file.name, keys, before, value, read, other)
        if case is weights_case and problem and problem.startswith("names neither"):
            continue  # the sentences on a base's sizes name the key alone, or the file alone
        if problem:
            wrong.append((keys, "gone" if value is GONE else str(value)[:20], problem))
    return len(attacks), wrong


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_every_key_of_a_file_is_checked(case, step, home, trained, base, capsys, monkeypatch):
    count, wrong = run_case(case, step, home, trained, base, capsys, monkeypatch)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"labels": {"background": 0, "a": 1, "a": 2}}', "the key 'a' comes twice"),
        ("[" * 10**6, "is not valid JSON"),
        ('{"labels": {"background": 0, "a": 1' + "0" * 5000 + "}}", "is not valid JSON"),
        (
            '{"labels": {"background": 0, "a": 1' + "0" * 400 + "}}",
            "'labels.a' should be a class number, 0 to 65535",
        ),
        ('{"spacing": {"a": [1e400, 1]}}', "'spacing.a' should be two lengths in mm, and is [inf, 1]"),
        ('{"group": "a{99999999999}"}', "'group' should be a regular expression"),
        ('\ufeff{"group": 3}', "'group' should be a regular expression, and is 3"),
    ],
)
def test_values_of_json_that_are_easily_missed(text, said, tmp_path):
    file = tmp_path / "dataset.json"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        path, content = read_dataset_json(tmp_path)
        add_spacing([], path, content)
        find_group(path, content)
        find_labels(path, content)
    assert said in str(error.value) and str(file) in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["", ".", "a\0", "\ud800.png", "x" * 5000])
def test_names_that_no_file_can_have(name, tmp_path):
    entry = dict(img_name=name, mask_name="a.png", prompts={})
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="train.json, record 0': 'img_name' should be a file's name"):
        read_annotations(tmp_path / "train.json")


@pytest.mark.parametrize(
    "name, entry",
    [
        ("batch_size", [1.5]), ("seed", [1.5]), ("lr", ["x"]), ("prompts", [""]), ("prompts", [None]),
        ("lr", dict(low=-1, high=1)), ("dim", dict(low=1.5, high=8)), ("prompts", dict(low=1, high=2)),
        ("lr", dict(low=1e-5, high=1e-3, log="x")), ("lr", dict(low=1e-5, high=math.inf)), ("dim", []),
        ("out", ["a"]), ("resume", [True]), ("overwrite", [True]), ("dry_run", [True]), ("help", [True]),
        ("version", [True]), ("no_such", [1]), ("lora_proj", [1]), ("ce", ["x"]), ("dims", [[8, "x"]]),
    ],
)  # fmt: skip
def test_a_space_takes_what_the_command_line_takes(name, entry):
    optuna = pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=f"'space.json': the search space's '{name}' should be"):
        make_distributions(optuna, {name: entry}, "space.json")


def test_spaces_that_are_right():
    optuna = pytest.importorskip("optuna")
    space = dict(
        lr=dict(low=1e-5, high=1e-3, log=True), dim=dict(low=8, high=64, step=8), lora_proj=[False, True],
        intermediate_dim=[32, 64], dims=[[8, 16], [16, 8]], ce=["logits"], augment=[True],
    )  # fmt: skip
    distributions = make_distributions(optuna, space, "space.json")
    assert distributions["intermediate_dim"].choices == (32, 64)
    assert distributions["dims"].choices == ("[8, 16]", "[16, 8]")
    assert (distributions["dim"].step, distributions["lr"].log) == (8, True)
