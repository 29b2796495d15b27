"""Base weights: finding and reading them (nothing in a file is executed), fingerprint, image size."""

import hashlib
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlsm.system.console import first_few, say_once
from vlsm.system.files import note_input
from vlsm.system.schema import field, read_json

RANDOM = "random:"
MINI = Path(__file__).parents[1] / "mini"  # the embedded CLIPSeg
TEXT_FILES = [
    "config.json",
    "preprocessor_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
]
HUB_SECONDS = 5  # after which the hub counts as out of reach
# an exception of huggingface_hub -> its meaning
HUB_ERRORS = {
    "LocalEntryNotFoundError": "it cannot be reached (no network, or HF_HUB_OFFLINE is set), and no copy was "
    "kept here",
    "RepositoryNotFoundError": "it does not exist, or is private and you are not logged in (hf auth login)",
    "RemoteEntryNotFoundError": "the repository lacks this file",
    "GatedRepoError": "accept their licence on their page of the hub, and log in with `hf auth login`",
}
# part of a tensor's name -> the checkpoint that has such names
CHECKPOINTS = {
    "side_adapter_network.": "a SAN checkpoint (--model san)",
    "neck.txt_proj.": "a CRIS checkpoint (--model cris; python -m vlsm.tools.convert_cris turns a .pth "
    "into a folder)",
    "film_mul.": "a CLIPSeg checkpoint (--model clipseg)",
    "detr_encoder.": "a SAM 3 checkpoint (--model sam3)",
    "visual.layer1.0.": "OpenAI's CLIP with a ResNet (python -m vlsm.tools.convert_cris makes a start for "
    "CRIS of it)",
    "visual.transformer.resblocks.": "OpenAI's CLIP with a vision transformer",
    "vision_model.encoder.layers.": "a Hugging Face CLIP (--model san)",
}


def guess_checkpoint(names):
    """Return a sentence that tells whose checkpoint has tensors of such names, or an empty text."""
    for piece, checkpoint in CHECKPOINTS.items():
        if any(piece in name for name in names):
            return f"It looks like {checkpoint}."
    return ""


def is_random(weights):
    """Tell whether the option `--weights` asks for random weights."""
    return str(weights).startswith(RANDOM)


def locate_weights(weights, network):
    """Return (folder of the weights and the tokenizer, configuration file).

    weights: "mini", a local folder, a hub id (downloaded and cached), or random:CONFIG.json, whose tokenizer
    is the one next to the file, else the embedded one. network: the class that loads them. Raises
    FileNotFoundError if there are no weights.
    """
    if weights is None:
        name = network.name.lower()
        raise FileNotFoundError(
            f"{network.name}'s weights are on no hub. Convert a checkpoint that you have with `python -m "
            f"vlsm.tools.convert_{name} FILE DIR` and pass --weights DIR."
        )
    weights = str(weights)
    if is_random(weights):
        return _locate_random(weights)
    folder = MINI if weights == "mini" else _locate_folder(weights)
    return folder, folder / "config.json"


def _locate_random(weights):
    file = Path(weights.removeprefix(RANDOM)).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no file '{file}'. --weights {RANDOM}CONFIG.json needs a file of a network's sizes."
        )
    for name in ("vocab.json", "tokenizer.json"):
        if (file.parent / name).is_file():
            return file.parent, file
    return MINI, file


def _locate_folder(name):
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise FileNotFoundError(
            f"'{folder}' holds no config.json. Expected a folder in Hugging Face layout: config.json and "
            "model.safetensors."
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"There is no folder '{name}' with weights, and it is no hub id of the form 'owner/name' either."
        )
    return _download(name)


def hub_answers():
    """Tell whether the Hugging Face hub answers within seconds; False with HF_HUB_OFFLINE=1.

    Its own functions try again for half a minute.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # of the network, or of the hub in offline mode
        return False
    return True


def describe_hub_error(error):
    """Return in words why a call of the hub failed."""
    name = type(error).__name__
    return HUB_ERRORS.get(name, f"{name}: {str(error)[:200]}")


def _download(name):
    from huggingface_hub import snapshot_download

    say_once(name, f"Looking for the weights '{name}' on the Hugging Face hub.")
    try:
        cached = not hub_answers()
        for file in ("model.safetensors", "pytorch_model.bin"):
            patterns = [*TEXT_FILES, file]
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
            if (folder / file).is_file():
                break
        return folder
    except Exception as error:  # the hub raises a dozen unrelated types
        raise FileNotFoundError(
            f"The weights '{name}' could not be downloaded from the Hugging Face hub: "
            f"{describe_hub_error(error)}. You may also run `hf download {name} --local-dir DIR` on another "
            "machine that has access to them, copy DIR here and pass --weights DIR. To try things without a "
            "network, --weights mini runs offline."
        ) from error


def load_safely(file, advice="Is the file complete?"):
    """Return the content of a file of safetensors, or of torch.save: tensors, numbers, texts, lists, dicts.

    Raises ValueError, with an `advice`, for a file that is damaged or holds more; nothing in it is executed.
    """
    note_input(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if zipfile.is_zipfile(file):  # as torch.save writes it, with a checksum of each part
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(damaged)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip, end-of-file, safetensors and runtime errors alike
        # torch.load's own text advises to execute what the file holds; of it we tell what that would be
        reason = " ".join([type(error).__name__, *re.findall(r"GLOBAL [\w.]+", str(error))])
        raise ValueError(
            f"'{file}' cannot be read ({reason}), and nothing in it was run. {advice}"
        ) from error


def read_tensors(folder):
    """Read all tensors of `model.safetensors`, or else of `pytorch_model.bin`, by name, in float32.

    Raises FileNotFoundError if there is neither, ValueError if the file is damaged or holds more than
    tensors.
    """
    safe = Path(folder) / "model.safetensors"
    pickled = Path(folder) / "pytorch_model.bin"
    if not safe.is_file() and not pickled.is_file():
        raise FileNotFoundError(f"'{folder}' holds neither model.safetensors nor pytorch_model.bin.")
    tensors = load_safely(safe if safe.is_file() else pickled)
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"'{pickled}' should hold tensors by name, and nothing else.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.float()
    return tensors


def describe_mismatch(expected, given):
    """Return how names and shapes of `given` tensors differ from the `expected`, as a text; empty if not."""
    missing = sorted(set(expected) - set(given))
    left_over = sorted(set(given) - set(expected))
    other_shape = []
    for name in expected:
        if name in given and given[name].shape != expected[name].shape:
            shape = list(given[name].shape)
            other_shape.append(f"{name} {shape} instead of {list(expected[name].shape)}")
    differences = {"missing": missing, "left over": left_over, "of another shape": other_shape}
    texts = []
    for difference, names in differences.items():
        if names:
            texts.append(f"{len(names)} {difference}: {first_few(names, 6)}")
    return "; ".join(texts)


def load_strictly(module, tensors, source, file_names):
    """Load `tensors` into `module` by name; every name and shape must match.

    Raises ValueError, which names the `source` and guesses the network from the `file_names` of its tensors.
    """
    mismatch = describe_mismatch(module.state_dict(), tensors)
    if mismatch:
        raise ValueError(
            f"{source} does not fit a {type(module).__name__} of this configuration. Tensors {mismatch}. "
            f"{guess_checkpoint(file_names)}"
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


# The size of images


DEFAULT_SIDE = 352  # pixels; CLIPSeg's, where the weights come without a preprocessor_config.json


def image_side(config, folder, requested=None):
    """Return the side of input images in pixels: requested, else the network's, else the image processor's.

    config: the network's; folder: of the weights. Raises ValueError for a side that is no multiple of the
    network's stride, and for a preprocessor_config.json with a side out of range.
    """
    side = requested or getattr(config, "img_size", None)
    if side is None:
        side = _processor_side(folder / "preprocessor_config.json")
    stride = config.stride
    if side % stride:
        fitting = round(side / stride) * stride or stride
        raise ValueError(
            f"--image-size {side} is no multiple of the model's patch size {stride}; try {fitting}."
        )
    return side


def _processor_side(file):
    """Return the side that a Hugging Face image processor resizes to: `size`, a number or a dictionary."""
    if not file.is_file():
        return DEFAULT_SIDE
    sizes = {"size": DEFAULT_SIDE, **read_json(file)}
    key = "size"
    if isinstance(sizes["size"], dict):
        sizes = sizes["size"]
        key = "height" if "height" in sizes else "shortest_edge"
    side = field(file, sizes, key, kind=int, words="a side in pixels")
    if not 1 <= side <= 8192:
        raise ValueError(f"'{file}': a side of {side} pixels is out of range (1 to 8192).")
    return side


# Names of tensors: a published checkpoint's into those of our modules, and back. A network lists pairs of
# patterns, (published, ours), where # is a number. If a checkpoint stacks the projections to q, k and v, our
# pattern ends in `qkv_proj.`, and the tensor is split in three.

STACKED = ".qkv_proj."
PROJECTION = re.compile(r"\.[qkv]_proj\.")
# of a block of OpenAI's CLIP
OPENAI_BLOCK = (
    ("resblocks.#.ln_1.", "resblocks.#.layer_norm1."),
    ("resblocks.#.ln_2.", "resblocks.#.layer_norm2."),
    ("resblocks.#.attn.in_proj_", "resblocks.#.self_attn.qkv_proj."),
    ("resblocks.#.attn.out_proj.", "resblocks.#.self_attn.out_proj."),
    ("resblocks.#.mlp.c_fc.", "resblocks.#.mlp.fc1."),
    ("resblocks.#.mlp.c_proj.", "resblocks.#.mlp.fc2."),
)


def replace(name, old, new):
    """Return a name with the pattern `old` replaced by `new`."""
    pattern = re.escape(old).replace(r"\#", r"(\d+)")
    return re.sub(pattern, new.replace("#", r"\1"), name)


def to_own(tensors, pairs):
    """Rename tensors to our names; those that have such a name already keep it."""
    renamed = {}
    for name, tensor in tensors.items():
        for published, ours in pairs:
            name = replace(name, published, ours)
        if STACKED in name:
            for letter, third in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(STACKED, f".{letter}_proj.")] = third.clone()
        else:
            renamed[name] = tensor
    return renamed


def to_published(tensors, pairs):
    """Rename tensors to the published names: undo `to_own`. If q, k or v is missing, they are not stacked."""
    renamed = {}
    for name, tensor in tensors.items():
        stacked = _published_name(PROJECTION.sub(STACKED, name), pairs)
        qkv = [PROJECTION.sub(f".{letter}_proj.", name) for letter in "qkv"]
        # the checkpoint stacks them if a pair of patterns has replaced `qkv_proj.`
        is_stacked = PROJECTION.search(name) and STACKED not in stacked and set(qkv) <= set(tensors)
        if not is_stacked:
            renamed[_published_name(name, pairs)] = tensor
        elif name == qkv[0]:  # stacked at the place of q; k and v are skipped
            renamed[stacked] = torch.cat([tensors[part] for part in qkv])
    return renamed


def _published_name(name, pairs):
    for published, ours in pairs:
        name = replace(name, ours, published)
    return name
