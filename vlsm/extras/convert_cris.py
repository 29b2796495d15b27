"""`python -m vlsm.extras.convert_cris SRC DST`: CRIS weights from the checkpoints that there are."""

import argparse
import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlsm.extras import checkpoint_archives
from vlsm.networks.clip import SIZE_TENSORS
from vlsm.networks.cris import CRIS, CRISConfig
from vlsm.networks.weights import describe_mismatch, guess_kind
from vlsm.system.console import friendly_errors
from vlsm.system.files import atomic_write, is_filled, read_json, write_json, write_text

TOKENIZER_FILES = ("vocab.json", "merges.txt")
# SHA-256 of RN50.pt, from its address
OPENAI_RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"


def own_names(given):
    """Return (our name of each of a checkpoint's tensors, whether they are CLIP's alone)."""
    names = {name: name.removeprefix("module.") for name in given}  # of DistributedDataParallel
    if any(name.startswith("neck.") for name in names.values()):
        return names, False
    return {name: f"backbone.{new}" for name, new in names.items() if new not in SIZE_TENSORS}, True


def convert(source, folder, config=None, tokenizer=None):
    """Write a folder for `--weights` from a CRIS checkpoint, or from OpenAI's RN50.pt, the rest added at
    random.

    config: a dictionary of sizes, where they are not the published ones. tokenizer: a folder with CLIP's.
    Every tensor is named, and none may be missing or left over. Raises ValueError or FileExistsError.
    """
    folder = Path(folder)
    if is_filled(folder):
        raise FileExistsError(f"'{folder}' exists and is not empty. Name another folder.")
    given = checkpoint_archives.read(source)
    names, openai = own_names(given)
    torch.manual_seed(0)
    network = CRIS(CRISConfig.from_dict(config or {}))
    own = network.published_names(network.state_dict())
    tensors = {new: given[name] for name, new in names.items()}
    missing = [n for n in own if n not in tensors]
    added = [n for n in missing if openai and (not n.startswith("backbone.") or ".connect." in n)]
    # old files lack them; nothing reads them
    counters = [n for n in missing if n.endswith("num_batches_tracked")]
    expected = {n: t for n, t in own.items() if n not in added + counters}
    mismatch = describe_mismatch(expected, tensors)
    if mismatch:
        kind = guess_kind(given)
        raise ValueError(f"'{source}' is no checkpoint of this network. Tensors {mismatch}. {kind}".rstrip())
    for name, new in names.items():
        print(f"{name} -> {new}")
    for name in added:
        print(f"(random) -> {name}")
    if tokenizer:
        for name in TOKENIZER_FILES:
            write_text(folder / name, (Path(tokenizer) / name).read_text(encoding="utf-8"))
    write_json(folder / "config.json", dict(model_type="cris", **asdict(network.config)))
    written = {name: tensors.get(name, t).to(t.dtype).contiguous() for name, t in own.items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(written, temporary, {"format": "pt"})
    print(f"Wrote '{folder}': {len(tensors)} tensors from '{source}', {len(added)} at random.")
    if openai and hashlib.sha256(Path(source).read_bytes()).hexdigest() != OPENAI_RN50:
        print("(Its SHA-256 is not that of OpenAI's RN50.pt. Nothing in the file was run.)")
    if not tokenizer:
        files = " and ".join(TOKENIZER_FILES)
        print(
            f"Before training, copy {files} of openai/clip-vit-base-patch16 there (--tokenizer FOLDER does "
            "it)."
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Make a folder for --weights of a CRIS checkpoint; nothing in the file is run."
    )
    parser.add_argument(
        "source", metavar="SRC", help="a CRIS checkpoint (cris_best.pth), or OpenAI's RN50.pt"
    )
    parser.add_argument("folder", metavar="DST", help="the folder to write")
    parser.add_argument("--config", metavar="FILE.json", help="sizes, where they are not the published ones")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="holds CLIP's vocab.json and merges.txt, to be copied"
    )
    args = parser.parse_args(argv)
    convert(args.source, args.folder, read_json(args.config) if args.config else None, args.tokenizer)


if __name__ == "__main__":
    with friendly_errors():
        main()
