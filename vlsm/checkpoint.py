"""Files that survive a crash: each is written under a temporary name, flushed to disk, then renamed."""

import csv
import io
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import weights as weights_io
from .model import load_base, tune

FORMAT = 1
UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


@contextmanager
def replacing(path):
    """A temporary path to write to; on success it takes the name `path`, on any error it is removed and `path` stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, rows):
    """Write rows of values, the first of which are the columns' names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def save_tuned(path, model, **about):
    """Write the tuned tensors and, as metadata (each value in JSON), what is needed to use them: `about` and the model's own `info`."""
    info = {k: v for k, v in model.info.items() if k not in ("folder", "config")}
    metadata = dict(format=FORMAT, **info, **about)
    with replacing(path) as temporary:
        save_file(model.tuned_state_dict(), temporary, {k: json.dumps(v) for k, v in metadata.items()})


def save_merged(folder, model):
    """Write a plain Hugging Face folder, weights last: the base with what was learnt merged in, beside the base's own small files.

    Raises ValueError where that cannot be, FileExistsError where the folder holds something already.
    """
    folder, source = Path(folder), Path(model.info["folder"])
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"'{folder}' exists and is not empty. Name another folder for the merged weights.")
    tensors = model.merged()
    for name in weights_io.TEXT_FILES:
        if name == "config.json":
            write_text(folder / name, json.dumps(model.info["config"], indent=1))
        elif (source / name).is_file():
            write_text(folder / name, (source / name).read_text(encoding="utf-8"))
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def locate(path):
    """A checkpoint's file: of a run's folder the best one, of a hub repository `owner/name` the one there, downloaded and cached.

    Raises FileNotFoundError where there is none.
    """
    file = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    if file.is_file():
        return file
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not file.suffix == ".safetensors" and not Path(path).parent.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(str(path), "best.safetensors"))
        except Exception as error:  # the hub raises a dozen unrelated types
            raise FileNotFoundError(
                f"There is no checkpoint '{path}' here, and none of that name could be fetched from the hub ({type(error).__name__})."
            ) from error
    raise FileNotFoundError(f"There is no checkpoint '{file}'.")


def read_metadata(path):
    """The metadata of a checkpoint, or of a run's best one, as a dictionary. Raises FileNotFoundError or ValueError in words."""
    path = locate(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise ValueError(f"The checkpoint '{path}' cannot be read ({str(error)[:200]}). Is the file complete?") from error
    if metadata.get("format") != json.dumps(FORMAT):
        raise ValueError(f"'{path}' is no checkpoint of this program (format {metadata.get('format')}, expected {FORMAT}).")
    return {name: json.loads(value) for name, value in metadata.items()}


def load_tensors(path):
    """The tuned tensors of a checkpoint, or of a run's best one."""
    return load_file(locate(path))


def check_base(path, about, base):
    """Raise ValueError unless the `Base` is the one that a checkpoint with the metadata `about` was tuned on."""
    if (base.model, base.network.reference) != (about["model"], about["reference"]) or base.fingerprint != about["fingerprint"]:
        kinds = [
            f"{model}{' with --reference' * reference}"
            for model, reference in ((about["model"], about["reference"]), (base.model, base.network.reference))
        ]
        raise ValueError(
            f"'{locate(path)}' was tuned on the base '{about['weights']}' ({kinds[0]}, fingerprint {about['fingerprint']}), and "
            f"'{base.weights}' is another base ({kinds[1]}, fingerprint {base.fingerprint}). Pass the right one with --weights."
        )


def load(path, weights=None):
    """The model of a run's checkpoint: its base (or `weights`, a folder or hub id holding the same base) and the trained tuner.

    The checkpoint's metadata stands in `model.about`. Raises ValueError if the base is not the one that was tuned.
    """
    about = read_metadata(path)
    base = load_base(about["model"], weights or about["weights"], about["reference"])
    check_base(path, about, base)
    model = tune(base, about["method"], **about["options"])
    model.load_tuned(load_tensors(path))
    model.about = about
    return model


def save_state(path, state):
    """Optimizer, scheduler, generators, counters: tensors, numbers, strings, lists and dictionaries only."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(path):
    """What `save_state` wrote; nothing in the file can execute. Raises ValueError in words if it is broken."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is nothing to resume: '{path}' does not exist.") from None
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read ({type(error).__name__}: {str(error)[:200]}). Start again with --overwrite.") from error
