"""`python -m vlsm.cris --convert SRC DST`: CRIS weights from the checkpoints that there are."""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import archives
from .checkpoint import replacing, write_text
from .clip import NUMBERS
from .cris import CRIS, CRISConfig
from .weights import differences, looks_like, read_json

TOKENIZER_FILES = ("vocab.json", "merges.txt")
OPENAI_RN50 = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"  # SHA-256 of RN50.pt, from its address


def own_names(given):
    """(our name of each of a checkpoint's tensors, whether they are CLIP's alone)."""
    names = {name: name.removeprefix("module.") for name in given}  # of DistributedDataParallel
    if any(name.startswith("neck.") for name in names.values()):
        return names, False
    return {name: f"backbone.{new}" for name, new in names.items() if new not in NUMBERS}, True


def convert(source, folder, config=None, tokenizer=None, say=print):
    """Write a folder for `--weights` from a CRIS checkpoint, or from OpenAI's RN50.pt, to which the rest is added at random.

    config: a dictionary of sizes, where they are not the published ones; tokenizer: a folder with CLIP's. Every tensor is named, and none
    may be missing or left over. Raises ValueError and FileExistsError in words.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"'{folder}' exists and is not empty. Name another folder.")
    given = archives.read(source)
    names, openai = own_names(given)
    torch.manual_seed(0)
    base = CRIS(CRISConfig.from_dict(config or {}))
    own, tensors = base.state_dict(), {new: given[name] for name, new in names.items()}
    added = [n for n in own if n not in tensors and (not n.startswith("backbone.") or ".connect." in n)] if openai else []
    counters = [n for n in own if n not in tensors and n.endswith("num_batches_tracked")]  # old files lack them; nothing reads them
    found = differences({n: t for n, t in own.items() if n not in added + counters}, tensors)
    if found:
        raise ValueError(f"'{source}' is no checkpoint of this network. Tensors {found}. {looks_like(given)}".rstrip())
    for name, new in names.items():
        say(f"{name} -> {new}")
    for name in added:
        say(f"(random) -> {name}")
    for name in TOKENIZER_FILES if tokenizer else ():
        write_text(folder / name, (Path(tokenizer) / name).read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps(dict(model_type="cris", **asdict(base.config)), indent=1))
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: tensors.get(name, t).to(t.dtype).contiguous() for name, t in own.items()}, temporary, {"format": "pt"})
    say(f"Wrote '{folder}': {len(tensors)} tensors from '{source}', {len(added)} at random.")
    if openai and hashlib.sha256(Path(source).read_bytes()).hexdigest() != OPENAI_RN50:
        say("(Its SHA-256 is not that of OpenAI's RN50.pt. Nothing in the file was run.)")
    if not tokenizer:
        say(f"Before training, copy {' and '.join(TOKENIZER_FILES)} of openai/clip-vit-base-patch16 there (--tokenizer FOLDER does it).")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make a folder for --weights of a CRIS checkpoint; nothing in the file is run.")
    what = "a CRIS checkpoint (cris_best.pth), or OpenAI's RN50.pt, and the folder to write"
    parser.add_argument("--convert", nargs=2, required=True, metavar=("SRC", "DST"), help=what)
    parser.add_argument("--config", metavar="FILE.json", help="sizes, where they are not the published ones")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="folder that holds CLIP's vocab.json and merges.txt, which are copied")
    args = parser.parse_args(argv)
    convert(*args.convert, read_json(args.config) if args.config else None, args.tokenizer)
