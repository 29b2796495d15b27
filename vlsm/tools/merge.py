"""Write a run's tuned weights merged into its base: a plain folder of weights, without adapters."""

import copy
from pathlib import Path

from safetensors.torch import save_file

from vlsm.checkpoint import load
from vlsm.networks.weights import TEXT_FILES
from vlsm.system.arguments import Parser
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import atomic_write, is_filled, write_json, write_text

EXAMPLES = """examples:
  python -m vlsm.tools.merge runs/kvasir-lora-seed42 merged-weights
  python -m vlsm.tools.merge hub:owner/polyps-lora merged-weights
  python -m vlsm.tools.merge runs/kvasir-full-seed42 merged --weights weights/clipseg"""


def merged_state_dict(model):
    """Return the network's tensors in float32, with the tuned weights merged in, by the published names.

    Raises ValueError for a method that does not act by changing the network's weights.
    """
    network = copy.deepcopy(model.network).float().cpu()
    copy.deepcopy(model.tuner).cpu().merge_into(network)
    return {name: t.contiguous() for name, t in network.published_names(network.state_dict()).items()}


def save_merged(folder, model):
    """Write a plain Hugging Face folder, weights last: the network with the tuned weights merged in.

    The base's tokenizer and processor files are copied. Raises ValueError if merging is not possible.
    """
    folder = Path(folder)
    source = Path(model.info["folder"])
    tensors = merged_state_dict(model)
    write_json(folder / "config.json", model.info["config"])
    for name in TEXT_FILES:
        if name != "config.json" and (source / name).is_file():
            write_text(folder / name, (source / name).read_text(encoding="utf-8"))
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.merge")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint of lora, decoder or full")
    parser.add_argument("folder", metavar="DIR", help="new folder for the weights, in Hugging Face layout")
    parser.add_argument("--weights", help="folder or hub id of the base, if it has moved")
    args = parser.parse_args(argv)
    if is_filled(Path(args.folder)):
        raise FileExistsError(f"'{args.folder}' exists and is not empty. Name another folder.")
    model = load(args.run, args.weights)
    save_merged(args.folder, model)
    also = " (transformers loads it, too)" if model.info["model"] == "clipseg" else ""
    say(f"Wrote '{args.folder}'{also}.\nLoad it with --weights {args.folder}")


if __name__ == "__main__":
    with friendly_errors():
        main()
