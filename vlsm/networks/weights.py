"""Base weights: where they come from, reading them (nothing in a file can execute), their fingerprint."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlsm.system.console import say_once

RANDOM = "random:"
MINI = Path(__file__).parents[1] / "mini"  # the embedded CLIPSeg
TEXT_FILES = [
    "config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip
# A piece of a tensor's name, and whose checkpoint has such names.
KINDS = (
    ("side_adapter_network.", "a SAN checkpoint (--model san)"),
    (
        "neck.txt_proj.",
        "a CRIS checkpoint (--model cris; python -m vlsm.tools.convert_cris turns a .pth into a folder)",
    ),
    ("film_mul.", "a CLIPSeg checkpoint (--model clipseg)"),
    ("detr_encoder.", "a SAM 3 checkpoint (--model sam3)"),
    (
        "visual.layer1.0.",
        "OpenAI's CLIP with a ResNet (python -m vlsm.tools.convert_cris makes a start for CRIS of it)",
    ),
    ("visual.transformer.resblocks.", "OpenAI's CLIP with a vision transformer"),
    ("vision_model.encoder.layers.", "a Hugging Face CLIP (--model san)"),
)


def guess_kind(names):
    """Return a sentence on what a checkpoint with tensors of such names is, or an empty text."""
    found = (kind for piece, kind in KINDS if any(piece in name for name in names))
    return next((f"It looks like {kind}." for kind in found), "")


def is_random(weights):
    """Tell whether the option `--weights` asks for random weights."""
    return str(weights).startswith(RANDOM)


def locate_weights(weights, network):
    """Return (folder of the weights and the tokenizer, configuration file).

    weights: "mini", a local folder, a hub id (downloaded and cached), or random:CONFIG.json, whose tokenizer
    is the one beside the file, else the embedded one. network: the class that they are for. Raises
    FileNotFoundError with what to do where there are none.
    """
    if weights is None:
        raise FileNotFoundError(
            f"{network.name}'s weights are on no hub. Convert a checkpoint that you have with "
            f"`python -m vlsm.tools.convert_{network.name.lower()} FILE DIR` and pass --weights DIR."
        )
    if not is_random(weights):
        folder = _locate_folder(weights)
        return folder, folder / "config.json"
    file = Path(str(weights).removeprefix(RANDOM)).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no file '{file}'. --weights {RANDOM}CONFIG.json wants a network's sizes in a JSON "
            "file."
        )
    has_tokenizer = any((file.parent / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    return file.parent if has_tokenizer else MINI, file


def _locate_folder(weights):
    if str(weights) == "mini":
        return MINI
    folder, name = Path(weights).expanduser(), str(weights)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"'{folder}' holds no config.json. Expected a folder in Hugging Face layout: config.json and "
                "model.safetensors."
            )
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"There is no folder '{name}' with weights, and it is no hub id of the form 'owner/name' either."
        )
    return _download(name)


def _download(name):
    from huggingface_hub import snapshot_download

    say_once(name, f"The base's weights are '{name}' on the Hugging Face hub, which is asked for them.")

    try:
        folder = Path(snapshot_download(name, allow_patterns=TEXT_FILES + ["model.safetensors"]))
        if not (folder / "model.safetensors").is_file():
            folder = Path(snapshot_download(name, allow_patterns=TEXT_FILES + ["pytorch_model.bin"]))
    except Exception as error:  # the hub raises a dozen unrelated types; all mean the same to the user
        if type(error).__name__ == "GatedRepoError":
            raise FileNotFoundError(
                f"The weights '{name}' are gated: accept their licence on their page of the hub and log in "
                f"with `hf auth login`; or run `hf download {name} --local-dir DIR` where you have access, "
                "and pass --weights DIR."
            ) from error
        raise FileNotFoundError(
            f"The weights '{name}' could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}). On a machine that reaches it, run `hf download {name} --local-dir "
            "DIR`, copy DIR here and pass --weights DIR. To try things without a network, --weights mini "
            "runs offline."
        ) from error
    return folder


def read_tensors(folder):
    """Read all tensors of `model.safetensors`, or else of `pytorch_model.bin`, by name, in float32.

    Raises FileNotFoundError where there is neither, ValueError where the file is damaged or holds more than
    tensors.
    """
    safe, pickled = Path(folder) / "model.safetensors", Path(folder) / "pytorch_model.bin"
    if not safe.is_file() and not pickled.is_file():
        raise FileNotFoundError(f"'{folder}' holds neither model.safetensors nor pytorch_model.bin.")
    try:
        if safe.is_file():
            tensors = load_file(safe)
        else:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # SafetensorError, UnpicklingError, zip and end-of-file errors alike
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(
            f"The weights in '{folder}' cannot be read ({reason}). Is the file complete?"
        ) from error
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def describe_mismatch(expected, given):
    """Return in words how names and shapes of `given` tensors differ from the `expected`, if they do."""
    shapes = [
        f"{n} {list(given[n].shape)} instead of {list(expected[n].shape)}"
        for n in expected
        if n in given and given[n].shape != expected[n].shape
    ]
    kinds = {
        "missing": sorted(set(expected) - set(given)),
        "left over": sorted(set(given) - set(expected)),
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(n)} {kind}: {', '.join(n[:6])}{', ...' if len(n) > 6 else ''}"
        for kind, n in kinds.items()
        if n
    )


def load_strictly(module, tensors, source, file_names):
    """Load `tensors` into `module` by name; every name and shape must match.

    Raises ValueError, which names the `source` and says what a file with tensors of `file_names` looks like.
    """
    mismatch = describe_mismatch(module.state_dict(), tensors)
    if mismatch:
        network = type(module).__name__
        raise ValueError(
            f"{source} does not fit a {network} of this configuration. Tensors {mismatch}. "
            f"{guess_kind(file_names)}".rstrip()
        )
    module.load_state_dict(tensors, assign=True)


def fingerprint(tensors):
    """Return 16 hex digits of the weights' names, shapes and float32 values."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
