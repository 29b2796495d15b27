"""Checkpoints: the tuned tensors and all that is needed to use them, in one safetensors file; and a run's
state.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlsm.model import attach_tuner, load_base
from vlsm.networks.weights import TEXT_FILES
from vlsm.system.files import atomic_write, is_filled, write_json, write_text

FORMAT = 1
METADATA = dict(
    model=str, weights=str, fingerprint=str, method=str, options=dict, reference=bool, dataset=str,
    data_root=str, split_seed=int, prompts=str, image_size=int, mean=list, std=list, recipe=dict,
)  # fmt: skip
REQUIRED = ("model", "weights", "fingerprint", "method", "options", "reference")
HUB = "hub:"  # before the name of a repository on the Hugging Face hub
HUB_ID = re.compile(rf"{HUB}[\w.-]+/[\w.-]+")


def save_tuned(path, model, **about):
    """Write the tuned tensors and, as metadata (each value in JSON), `about` and the model's own `info`."""
    info = {k: v for k, v in model.info.items() if k not in ("folder", "config")}
    metadata = dict(format=FORMAT, **info, **about)
    with atomic_write(path) as temporary:
        save_file(model.tuned_state_dict(), temporary, {k: json.dumps(v) for k, v in metadata.items()})


def save_merged(folder, model):
    """Write a plain Hugging Face folder, weights last: the base with what was learnt merged in.

    The base's own small files are copied. Raises ValueError where merging cannot be, FileExistsError where
    the folder holds something already.
    """
    folder, source = Path(folder), Path(model.info["folder"])
    if is_filled(folder):
        raise FileExistsError(
            f"'{folder}' exists and is not empty. Name another folder for the merged weights."
        )
    tensors = model.merged_state_dict()
    write_json(folder / "config.json", model.info["config"])
    for name in TEXT_FILES:
        if name != "config.json" and (source / name).is_file():
            write_text(folder / name, (source / name).read_text(encoding="utf-8"))
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def locate_checkpoint(path):
    """Return a checkpoint's file: of a run's folder the best one, of "hub:owner/name" the one in that hub
    repository, downloaded.

    Raises FileNotFoundError where there is none.
    """
    if HUB_ID.fullmatch(str(path)):
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(str(path).removeprefix(HUB), "best.safetensors"))
        except Exception as error:  # the hub raises a dozen unrelated types
            raise FileNotFoundError(
                f"The checkpoint '{path}' could not be fetched from the hub ({type(error).__name__})."
            ) from error
    file = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    if file.is_file():
        return file
    repository = HUB_ID.fullmatch(f"{HUB}{path}") and not file.suffix
    also = f" A repository of the hub is named {HUB}{path}." if repository else ""
    raise FileNotFoundError(f"There is no checkpoint '{file}'.{also}")


def read_metadata(path):
    """Return the metadata of a checkpoint, or of a run's best one, as a dictionary.

    Raises FileNotFoundError where there is none, ValueError for a file that is damaged or no checkpoint.
    """
    path = locate_checkpoint(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise ValueError(
            f"The checkpoint '{path}' cannot be read ({str(error)[:200]}). Is the file complete?"
        ) from error
    if metadata.get("format") != json.dumps(FORMAT):
        found = metadata.get("format")
        raise ValueError(f"'{path}' is no checkpoint of this program (format {found}, expected {FORMAT}).")
    about = {}
    for name, value in metadata.items():
        try:
            about[name] = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"'{path}': the metadata's '{name}' is not valid JSON.") from None
    _check_metadata(path, about)
    return about


def _check_metadata(path, about):
    """Raise ValueError, which names the file and the key, for metadata that no checkpoint can have."""
    for name, kind in METADATA.items():
        if name in about and not isinstance(about[name], kind) or name in REQUIRED and name not in about:
            found = about.get(name, "missing")
            raise ValueError(f"'{path}': the metadata's '{name}' should be {kind.__name__}; it is {found!r}.")
    if not 1 <= about.get("image_size", 1) <= 8192:
        raise ValueError(f"'{path}': the metadata's 'image_size' {about['image_size']} cannot be.")
    for name, least in (("mean", -1e3), ("std", 1e-6)):
        values = about.get(name, [1.0] * 3)
        if len(values) != 3 or not all(isinstance(v, (int, float)) and least <= v <= 1e3 for v in values):
            raise ValueError(
                f"'{path}': the metadata's '{name}' {values} are no three numbers to normalise by."
            )


def read_tuned(path):
    """Return the tuned tensors of a checkpoint, or of a run's best one. Raises ValueError for NaN."""
    path = locate_checkpoint(path)
    tensors = load_file(path)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"'{path}': NaN or infinity in {', '.join(broken[:3])}.")
    return tensors


def check_base(path, about, base):
    """Raise ValueError unless a checkpoint with the metadata `about` was tuned on this `Base`."""

    def describe(model, reference, fingerprint):
        return f"{model}{' with --reference' if reference else ''}, fingerprint {fingerprint}"

    wanted = about["model"], about["reference"], about["fingerprint"]
    found = base.model, base.network.reference, base.fingerprint
    if wanted != found:
        raise ValueError(
            f"'{locate_checkpoint(path)}' was tuned on the base '{about['weights']}' ({describe(*wanted)}), "
            f"and '{base.weights}' is another base ({describe(*found)}). Pass the right one with --weights."
        )


def load(path, weights=None):
    """Return the model of a run's checkpoint: its base and the trained tuner, in eval mode.

    weights: a folder or hub id that holds the same base, if it has moved. The checkpoint's metadata stands in
    `model.about`. Raises ValueError if the base is not the one that was tuned.
    """
    about = read_metadata(path)
    base = load_base(about["model"], weights or about["weights"], about["reference"])
    check_base(path, about, base)
    model = attach_tuner(base, about["method"], about["options"], about)
    model.load_tuned(read_tuned(path))
    return model


def save_state(path, state):
    """Write what a run needs to resume: tensors, numbers, texts, lists and dictionaries only."""
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def load_state(path):
    """Read what `save_state` wrote; nothing in the file can execute. Raises ValueError if it is broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is nothing to resume: '{path}' does not exist.") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"'{path}' cannot be read ({reason}). Start again with --overwrite.") from error
