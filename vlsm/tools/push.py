"""Upload a run's best checkpoint and a card to a repository of the Hugging Face hub.

Only the tuned tensors and the checkpoint's metadata are uploaded; the metadata names the folder of the data.
`vlsm.load("hub:owner/name")` and `--ckpt hub:owner/name` read it back.
"""

import tempfile
from pathlib import Path

from vlsm.checkpoint import HUB, HUB_ID, locate_checkpoint, read_metadata
from vlsm.system.arguments import Parser
from vlsm.system.console import friendly_errors, say

EXAMPLE = "example:\n  python -m vlsm.tools.push runs/kvasir-dense-64-seed42 owner/polyps"
FILE = "best.safetensors"
CARD = """---
library_name: vlsm
base_model: {weights}
tags: [image-segmentation, medical]
---
`{method}`, trained on `{dataset}` (best validation DSC {score}) on the frozen base `{weights}` ({model}): a
checkpoint of the project vlsm, {size:.1f} MB. The base is not in it.

    model = vlsm.load("hub:{repo}")
    python evaluate.py --ckpt hub:{repo} --images DIR --prompt "..." --save-masks OUT

Options: `{options}`. Images of {image_size} x {image_size} pixels; prompts: {prompts}. Research software, not
a medical device.
"""


def model_card(metadata, repo, nbytes):
    """Return the text of a checkpoint's card."""
    fields = {}
    for name in ("weights", "method", "model", "options", "image_size", "prompts"):
        fields[name] = metadata.get(name, "unknown")
    dataset = Path(metadata.get("dataset", "unknown")).name  # without its folder
    dsc = metadata.get("best_val_dsc")
    score = "unknown" if dsc is None else f"{100 * dsc:.1f} %"
    return CARD.format(repo=repo, dataset=dataset, score=score, size=nbytes / 1e6, **fields)


def push_to_hub(run, repo, private=True):
    """Upload a run's best checkpoint, or a checkpoint file, to the repository `owner/name`; return its URL.

    The repository is created if it does not exist. Raises ValueError for a name of another form, or if the
    upload fails.
    """
    if not HUB_ID.fullmatch(HUB + repo):
        raise ValueError(f"'{repo}' is not the name of a hub repository; give one of the form 'owner/name'.")
    from huggingface_hub import HfApi

    file = locate_checkpoint(run)
    card = model_card(read_metadata(run), repo, file.stat().st_size)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        Path(folder, FILE).write_bytes(file.read_bytes())
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A checkpoint of vlsm")
        except Exception as error:  # the hub raises a dozen unrelated types
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise ValueError(
                f"The upload to '{repo}' failed ({reason}). Log in with: hf auth login."
            ) from error
    return f"https://huggingface.co/{repo}"


def main(argv=None):
    parser = Parser(__doc__, EXAMPLE, prog="python -m vlsm.tools.push")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("repo", metavar="OWNER/NAME", help="hub repository, created if it does not exist")
    parser.add_argument("--public", action="store_true", help="create it public (default: private)")
    args = parser.parse_args(argv)
    say(f"Uploaded to {push_to_hub(args.run, args.repo, not args.public)}")


if __name__ == "__main__":
    with friendly_errors():
        main()
