"""Checkpoints: the tuned tensors and what is needed to use them, in one safetensors file; a run's state."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from vlsm.model import attach, read_network
from vlsm.networks.weights import describe_hub_error, fingerprint, hub_answers
from vlsm.system.console import did_you_mean, first_few
from vlsm.system.files import atomic_write, digest, note_input
from vlsm.system.schema import NUMBER, OBJECT, SWITCH, TEXT, check_fields, naming

FORMAT = 1
SEED = (int, "a whole number from 0", 0, 2**64)
NUMBERS = [(int, float)] * 3
# The schema of the metadata, see `check_fields`; what a ? follows is not in all runs, or null.
METADATA = {
    "model": TEXT, "weights": TEXT, "fingerprint": TEXT, "method": TEXT, "options": OBJECT,
    "reference": SWITCH, "dataset": TEXT, "data_root": TEXT, "prompts": TEXT, "split_seed": SEED,
    "image_size": (int, "a side of 1 to 8192 pixels", 1, 8192),
    "mean": (NUMBERS, "three numbers to subtract", -1e3, 1e3),
    "std": (NUMBERS, "three numbers to divide by", 1e-6, 1e3),
    "recipe": OBJECT, "recipe.seed": SEED, "recipe.negatives?": SEED,
    "group?": (re.Pattern, "a regular expression"),
    "fold?": (re.compile(r"\d+/\d+"), "a fold such as 1/5"),
    "no_mask_is_empty?": SWITCH, "skip_bad?": SWITCH,
    "class_words?": ([str], "a list of words"), "best_val_dsc?": NUMBER,
}  # fmt: skip
REPEATED = ("seed", "fold")  # settings by which the runs of a group may differ
OF_THIS_MACHINE = ("folder", "config", "fresh")  # keys of a model's `info` that a checkpoint leaves out
HUB = "hub:"  # before the name of a repository on the Hugging Face hub
HUB_ID = re.compile(rf"{HUB}[\w.-]+/[\w.-]+")


def save_tuned(path, model, **metadata):
    """Write the tuned tensors and, as metadata (each value in JSON), the model's `info` and `metadata`.

    A digest of both, also in the metadata, tells `read_tuned` of damage.
    """
    described = {name: value for name, value in model.info.items() if name not in OF_THIS_MACHINE}
    texts = {name: json.dumps(value) for name, value in dict(format=FORMAT, **described, **metadata).items()}
    tensors = model.tuned_state_dict()
    texts["digest"] = _digest(tensors, texts)
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, texts))


def _digest(tensors, texts):
    """Return the digest of a checkpoint's tensors and metadata, in JSON."""
    content = [fingerprint(tensors), sorted(texts.items())]
    return json.dumps(digest(json.dumps(content).encode()))


def locate_checkpoint(path):
    """Return the file of a checkpoint: a file; a run's folder, of which the best one; or "hub:owner/name",
    which is downloaded.

    Raises FileNotFoundError if there is no checkpoint.
    """
    if HUB_ID.fullmatch(str(path)):
        from huggingface_hub import hf_hub_download

        try:
            repository = str(path).removeprefix(HUB)
            cached = not hub_answers()
            return Path(hf_hub_download(repository, "best.safetensors", local_files_only=cached))
        except Exception as error:  # the hub raises a dozen unrelated types
            raise FileNotFoundError(
                f"The checkpoint '{path}' could not be fetched from the hub: {describe_hub_error(error)}."
            ) from error
    path = Path(path)
    file = path / "best.safetensors" if path.is_dir() else path
    if file.is_file():
        return file
    folder = path.parent
    runs = sorted(best.parent.name for best in folder.glob("*/best.safetensors"))
    guess = did_you_mean(path.name, runs)
    raise FileNotFoundError(
        f"There is no checkpoint '{file}'.{guess} Runs in '{folder}': {first_few(runs) or 'none'}. A run on "
        f"the hub is named {HUB}OWNER/NAME."
    )


def read_metadata(path):
    """Return the metadata of a checkpoint (of a run's folder: its best one) as a dictionary.

    Raises FileNotFoundError where there is none, ValueError for a file that is damaged or no checkpoint.
    """
    path = locate_checkpoint(path)
    try:
        with safe_open(note_input(path), "pt") as file:
            texts = file.metadata() or {}
    except Exception as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02"):  # a zip archive, or a pickle, which may execute what it holds
            raise ValueError(
                f"'{path}' is a file of PyTorch (.ckpt, .pt), not a checkpoint of this program, and is not "
                "loaded. Give a run's folder, or its best.safetensors."
            ) from None
        raise ValueError(
            f"The checkpoint '{path}' cannot be read ({str(error)[:200]}). Is the file complete?"
        ) from error
    if texts.get("format") != json.dumps(FORMAT):
        raise ValueError(
            f"'{path}' is no checkpoint of this program (format {texts.get('format')}, expected {FORMAT})."
        )
    metadata = {}
    for name, text in texts.items():
        try:
            metadata[name] = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"'{path}': the metadata's '{name}' is not valid JSON.") from None
    check_fields(f"metadata of {path}", metadata, METADATA)
    return metadata


def read_tuned(path):
    """Return the tuned tensors of a checkpoint (of a run's folder: its best one).

    Raises ValueError for NaN or infinity, and for a file that is not as it was written.
    """
    path = locate_checkpoint(path)
    with safe_open(note_input(path), "pt") as file:
        texts = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    written = texts.pop("digest", None)  # checkpoints of earlier versions have none
    if written and written != _digest(tensors, texts):
        raise ValueError(
            f"'{path}' is damaged: its content is not what was written there. Take a copy of it, or of the "
            "run's last.safetensors."
        )
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"'{path}': NaN or infinity in {first_few(broken)}.")
    return tensors


def load(path, weights=None, base=None):
    """Return the model of a run's checkpoint: its base and the trained tuner, in eval mode.

    weights: a folder or hub id that holds the same base, if it has moved. base: a VLSM in memory; its frozen
    weights are shared if the checkpoint was tuned on them, so that several runs hold one base. The
    checkpoint's metadata is `model.metadata`. Raises ValueError if the base is not the one that was tuned.
    """
    metadata = read_metadata(path)
    share = base is not None and not base.tuned_names and _identity(metadata) == _identity(base.info)
    if share:
        network = base.network
        description = base.info
    else:
        network, description = read_network(
            metadata["model"], weights or metadata["weights"], metadata["reference"]
        )
    _check_base(path, metadata, description)
    with naming(path):
        model = attach(network, description, metadata["method"], metadata["options"], share)
    model.metadata = metadata
    model.load_tuned(read_tuned(path))
    return model


def start_from(model, path):
    """Copy a run's tuned tensors into a model, as the start of another run.

    Raises ValueError if the run was tuned on another base, or by another method or other options.
    """
    metadata = read_metadata(path)
    _check_base(path, metadata, model.info)
    tensors = read_tuned(path)
    try:
        model.load_tuned(tensors)
    except ValueError as error:
        raise ValueError(
            f"--init '{path}' was tuned by --peft {metadata['method']} with {metadata['options']}. {error}"
        ) from None


def run_settings(metadata):
    """Return all that tells a run from others, {name: value}; runs that differ in `REPEATED` alone repeat it.

    A base is named by its weights' last part and fingerprint, a data set by its last part: both may move.
    """
    settings = {}
    for name in ("method", "model", "reference", "image_size", "prompts", "split_seed", "group", "fold"):
        settings[name] = metadata.get(name)
    settings["dataset"] = Path(metadata["dataset"]).name
    settings["folds"] = (metadata.get("fold") or "/").split("/")[1]
    settings["no_mask_is_empty"] = bool(metadata.get("no_mask_is_empty"))
    settings["weights"] = f"{Path(metadata['weights']).name} {metadata['fingerprint'][:6]}"
    earlier = {"negatives": 0}  # runs of earlier versions had none
    return settings | earlier | metadata["options"] | metadata["recipe"]


def differing_settings(settings_of):
    """Return the names of the settings in which runs differ, but for `REPEATED`; settings_of: of each run."""
    values = {}
    for settings in settings_of:
        values |= settings
    names = []
    for name, value in values.items():
        if name not in REPEATED and any(settings.get(name) != value for settings in settings_of):
            names.append(name)
    return names


def refuse_other_runs(paths):
    """Raise ValueError if runs differ in more than `REPEATED`, as then their mean says nothing."""
    settings_of = [run_settings(read_metadata(path)) for path in paths]
    differing = differing_settings(settings_of)
    if differing:
        values = dict.fromkeys(str(settings.get(differing[0])) for settings in settings_of)
        raise ValueError(
            f"The runs in '{Path(paths[0]).parent}' differ in '{differing[0]}' ({first_few(values)}), so "
            "they have no mean. Evaluate each by itself; python -m vlsm.tools.report puts them in columns."
        )


def _check_base(path, metadata, info):
    """Raise ValueError if a checkpoint with this metadata was tuned on another base than that of `info`."""
    wanted = _identity(metadata)
    given = _identity(info)
    if wanted != given:
        raise ValueError(
            f"'{locate_checkpoint(path)}' was tuned on the base '{metadata['weights']}' "
            f"({_describe_base(*wanted)}), and '{info['weights']}' is another base "
            f"({_describe_base(*given)}). Pass the right one with --weights."
        )


def _identity(info):
    """Return what identifies a base: (model, reference, fingerprint) of a VLSM's `info`, or of metadata."""
    return info["model"], info["reference"], info["fingerprint"]


def _describe_base(model, reference, fingerprint):
    return f"{model}{' with --reference' if reference else ''}, fingerprint {fingerprint}"


def save_state(path, state):
    """Write what a run needs to resume: tensors, numbers, texts, lists and dictionaries only."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
