"""Convert a CRIS checkpoint, or OpenAI's RN50.pt as a start for CRIS, into a folder for --weights.

Every tensor is named on the screen; a file with tensors missing or left over is refused. Nothing in a file is
executed, except in OpenAI's archive, which is a program: only the published file, by its digest, is read.
"""

import hashlib
import io
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlsm.networks.clip import SIZE_TENSORS
from vlsm.networks.cris import CRIS, CRISConfig
from vlsm.networks.weights import describe_mismatch, guess_checkpoint, load_safely
from vlsm.system.arguments import Parser
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import atomic_write, is_filled, write_json, write_text
from vlsm.system.schema import read_json

EXAMPLES = """examples:
  python -m vlsm.tools.convert_cris cris_best.pth weights/cris --tokenizer clip-folder
  python -m vlsm.tools.convert_cris RN50.pt weights/cris-start --tokenizer clip-folder
  python -m vlsm.tools.convert_cris small.pth weights/small --config sizes.json"""
TOKENIZER_FILES = ("vocab.json", "merges.txt")
# SHA-256 of the file that OpenAI published; it is also in the file's address
OPENAI_RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"


def read_tensors(path):
    """Return the tensors of a checkpoint by name.

    path: safetensors, a state dictionary that torch.save wrote, alone or under `state_dict`, or OpenAI's
    RN50.pt. Raises FileNotFoundError, or ValueError for a file that is damaged, holds more or less than
    tensors, or is another TorchScript archive.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    if is_torchscript(path):
        return read_openai_archive(path)
    checkpoint = load_safely(
        path,
        "Is the file complete? If it holds more than tensors (GLOBAL ...) and you trust it, save its state "
        "dictionary alone: torch.save(checkpoint['state_dict'], FILE).",
    )
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("state_dict", checkpoint)
    if not isinstance(checkpoint, dict) or not any(map(torch.is_tensor, checkpoint.values())):
        raise ValueError(f"'{path}' holds no state dictionary.")
    return {name: value for name, value in checkpoint.items() if torch.is_tensor(value)}


def is_torchscript(path):
    """Tell whether a file is an archive of torch.jit.save's."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_openai_archive(path):
    """Return the tensors of OpenAI's RN50.pt. Raises ValueError for any other TorchScript archive."""
    archive = path.read_bytes()
    digest = hashlib.sha256(archive).hexdigest()
    if digest != OPENAI_RN50:
        raise ValueError(
            f"'{path}' is a TorchScript archive, which holds a program, and its SHA-256 is {digest}. Only "
            f"OpenAI's RN50.pt is read, whose SHA-256 is {OPENAI_RN50}. Nothing in it was run. Is the file "
            "complete?"
        )
    return torch.jit.load(io.BytesIO(archive), map_location="cpu").state_dict()  # the bytes that were hashed


def convert(source, folder, config=None, tokenizer=None):
    """Write a folder for `--weights`; layers that CRIS adds to OpenAI's CLIP start at random.

    config: a dictionary of sizes that differ from the published ones. tokenizer: a folder with CLIP's. Raises
    as `read_tensors`, ValueError for tensors missing or left over, FileExistsError if the folder is not
    empty.
    """
    folder = Path(folder)
    if is_filled(folder):
        raise FileExistsError(f"'{folder}' exists and is not empty. Name another folder.")
    given = read_tensors(source)
    names = {name: name.removeprefix("module.") for name in given}  # of DistributedDataParallel
    clip_alone = not any(name.startswith("neck.") for name in names.values())
    if clip_alone:
        names = {name: f"backbone.{new}" for name, new in names.items() if new not in SIZE_TENSORS}
    tensors = {new: given[name] for name, new in names.items()}

    torch.manual_seed(0)
    network = CRIS(CRISConfig.from_dict(config or {}))
    written = CRIS.published_names(network.state_dict())
    random = []
    if clip_alone:
        random = [name for name in written if ".connect." in name or not name.startswith("backbone.")]
    expected = {name: tensor for name, tensor in written.items() if name not in random}
    mismatch = describe_mismatch(expected, tensors)
    if mismatch:
        hint = guess_checkpoint(given)
        raise ValueError(f"'{source}' is no checkpoint of this network. Tensors {mismatch}. {hint}")
    for name, tensor in expected.items():
        written[name] = tensors[name].to(tensor.dtype).contiguous()
    if tokenizer:
        for name in TOKENIZER_FILES:
            write_text(folder / name, Path(tokenizer, name).read_text(encoding="utf-8"))
    write_json(folder / "config.json", dict(model_type="cris", **asdict(network.config)))
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(written, temporary, {"format": "pt"})
    for name, new in names.items():
        say(f"{name} -> {new}")
    for name in random:
        say(f"(random) -> {name}")
    say(f"Wrote '{folder}': {len(tensors)} tensors from '{source}', {len(random)} at random.")


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.convert_cris")
    parser.add_argument(
        "source", metavar="SRC", help="a CRIS checkpoint (cris_best.pth), or OpenAI's RN50.pt"
    )
    parser.add_argument("folder", metavar="DST", help="folder to write")
    parser.add_argument("--config", metavar="FILE.json", help="sizes, if they are not the published ones")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="holds CLIP's vocab.json and merges.txt, to be copied"
    )
    args = parser.parse_args(argv)
    config = read_json(args.config) if args.config else None
    convert(args.source, args.folder, config, args.tokenizer)
    if not args.tokenizer:
        say(
            f"Before training, copy {' and '.join(TOKENIZER_FILES)} of openai/clip-vit-base-patch16 there "
            "(--tokenizer FOLDER does it)."
        )


if __name__ == "__main__":
    with friendly_errors():
        main()
