"""Frozen base weights: where they come from, how they are read (nothing in a file can execute) and their fingerprint."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

DEFAULT_WEIGHTS = "CIDAS/clipseg-rd64-refined"
MINI = Path(__file__).parent / "mini"
TEXT_FILES = ["config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]


def resolve(weights):
    """Folder with the weights: of `mini` (the embedded base), a local folder, or a Hugging Face hub id (downloaded and cached).

    Raises FileNotFoundError with what to do, where there are none.
    """
    if str(weights) == "mini":
        return MINI
    folder = Path(weights).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"'{folder}' holds no config.json. Expected a folder in Hugging Face layout: config.json and model.safetensors."
            )
        return folder
    name = str(weights)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"There is no folder '{name}' with weights, and it is no hub id of the form 'owner/name' either.")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=TEXT_FILES + ["model.safetensors"]))
        if not (folder / "model.safetensors").is_file():
            folder = Path(snapshot_download(name, allow_patterns=TEXT_FILES + ["pytorch_model.bin"]))
    except Exception as error:  # the hub raises a dozen unrelated types; all mean the same to the user
        raise FileNotFoundError(
            f"The weights '{name}' could not be downloaded from the Hugging Face hub ({type(error).__name__}). On a machine that "
            f"reaches it, run `hf download {name} --local-dir DIR`, copy DIR here and pass --weights DIR. "
            "To try things without a network, --weights mini runs offline."
        ) from error
    return folder


def read_json(path, kind=dict, words="a JSON object"):
    """The JSON value of a type (`words` names it) in a file; ValueError in words if it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}). Was it cut off, or saved as another format?") from error
    if not isinstance(value, kind):
        raise ValueError(f"'{path}' should hold {words}, and holds a {type(value).__name__}.")
    return value


def read_tensors(folder):
    """All tensors of `model.safetensors`, or else of `pytorch_model.bin`, by name, in float32."""
    folder = Path(folder)
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        if safe.is_file():
            tensors = load_file(safe)
        elif pickled.is_file():
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        else:
            raise FileNotFoundError(f"'{folder}' holds neither model.safetensors nor pytorch_model.bin.")
    except FileNotFoundError:
        raise
    except Exception as error:  # SafetensorError, UnpicklingError, zip and end-of-file errors alike
        raise ValueError(
            f"The weights in '{folder}' cannot be read ({type(error).__name__}: {str(error)[:200]}). Is the file complete?"
        ) from error
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def differences(own, given):
    """In words, how the names and shapes of `given` tensors differ from those of `own`; empty if they do not."""
    kinds = {
        "missing": sorted(set(own) - set(given)),
        "left over": sorted(set(given) - set(own)),
        "of another shape": [
            f"{n} {list(given[n].shape)} instead of {list(own[n].shape)}" for n in own if n in given and given[n].shape != own[n].shape
        ],
    }
    return "; ".join(f"{len(n)} {kind}: {', '.join(n[:6])}{', ...' if len(n) > 6 else ''}" for kind, n in kinds.items() if n)


def load_strictly(module, tensors, unused, source):
    """Load `tensors` into `module` by name. Every name must match, but for those on the list `unused`."""
    tensors = {name: t for name, t in tensors.items() if name not in unused}
    found = differences(module.state_dict(), tensors)
    if found:
        raise ValueError(f"{source} does not fit a {type(module).__name__} of this configuration. Tensors {found}.")
    module.load_state_dict(tensors, assign=True)


def fingerprint(tensors):
    """16 hex digits that name a set of weights: over names, shapes and float32 values, whatever file they came from."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
