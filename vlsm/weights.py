"""Frozen base weights: where they come from, how they are read (nothing in a file can execute) and their fingerprint."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

RANDOM = "random:"
MINI = Path(__file__).parent / "mini"
TEXT_FILES = ["config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]


# What a file's tensors are called tells whose they are: a piece of a name, what it looks like.
KINDS = (
    ("side_adapter_network.", "a SAN checkpoint (--model san)"),
    ("neck.txt_proj.", "a CRIS checkpoint (--model cris; python -m vlsm.cris --convert turns a .pth into a folder)"),
    ("film_mul.", "a CLIPSeg checkpoint (--model clipseg)"),
    ("visual.layer1.0.", "OpenAI's CLIP with a ResNet (python -m vlsm.cris --convert makes a start for CRIS of it)"),
    ("visual.transformer.resblocks.", "OpenAI's CLIP with a vision transformer"),
    ("vision_model.encoder.layers.", "a Hugging Face CLIP (--model san)"),
)


def looks_like(names):
    """A sentence on what tensors of such names are, or nothing."""
    return next((f"It looks like {kind}." for piece, kind in KINDS if any(piece in name for name in names)), "")


def advice(networks, model_type):
    """A sentence on which of some networks a `model_type` fits, or nothing."""
    return "".join(f"That is --model {name}." for name, kind in networks.items() if model_type in kind.model_types)


def is_random(weights):
    return str(weights).startswith(RANDOM)


def resolve(weights, network):
    """(folder with the weights, its configuration file): of `mini` (the embedded base), a local folder, or a Hugging Face hub id
    (downloaded and cached). Of random:CONFIG.json the folder is the one that has the tokenizer: the file's own, else the embedded base's.

    network: the class that they are for. Raises FileNotFoundError with what to do, where there are none.
    """
    if weights is None:
        raise FileNotFoundError(
            f"{network.name}'s weights are on no hub. Convert a checkpoint that you have with `python -m vlsm.{network.name.lower()} "
            "--convert FILE DIR` and pass --weights DIR."
        )
    if is_random(weights):
        file = Path(str(weights).removeprefix(RANDOM)).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"There is no file '{file}'. --weights {RANDOM}CONFIG.json wants a network's sizes in a JSON file.")
        has_tokenizer = any((file.parent / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        return file.parent if has_tokenizer else MINI, file
    folder = _folder(weights)
    return folder, folder / "config.json"


def _folder(weights):
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


def load_strictly(module, tensors, source, names):
    """Load `tensors` into `module` by name; every name must match. Raises ValueError, which says what a file of such `names` is."""
    found = differences(module.state_dict(), tensors)
    if found:
        kind = looks_like(names)
        raise ValueError(f"{source} does not fit a {type(module).__name__} of this configuration. Tensors {found}. {kind}".rstrip())
    module.load_state_dict(tensors, assign=True)


def fingerprint(tensors):
    """16 hex digits that name a set of weights: over names, shapes and float32 values, whatever file they came from."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
