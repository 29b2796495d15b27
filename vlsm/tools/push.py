"""Upload a run's best checkpoint and a card to a repository of the Hugging Face hub.

Only the tuned tensors and the checkpoint's metadata are uploaded; the metadata names the folder of the data.
`vlsm.load("hub:owner/name")` and `--ckpt hub:owner/name` read it back.
"""

import tempfile
from pathlib import Path

from vlsm.checkpoint import HUB, HUB_ID, locate_checkpoint, read_metadata
from vlsm.networks.weights import describe_hub_error, hub_answers
from vlsm.system.arguments import Parser
from vlsm.system.console import friendly_errors, say

EXAMPLES = """examples:
  python -m vlsm.tools.push runs/kvasir-dense-64-seed42 owner/polyps
  python -m vlsm.tools.push runs/kvasir-dense-64-seed42 owner/polyps --public
  python -m vlsm.tools.push runs/kvasir-dense-64-seed42/last.safetensors owner/polyps-last"""
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
    fields = dict(image_size="unknown", prompts="unknown") | metadata
    dsc = metadata.get("best_val_dsc")
    fields["dataset"] = Path(metadata.get("dataset", "unknown")).name  # without its folder
    fields["score"] = "unknown" if dsc is None else f"{100 * dsc:.1f} %"
    return CARD.format(repo=repo, size=nbytes / 1e6, **fields)


def push_to_hub(run, repo, private=True):
    """Upload a run's best checkpoint, or a checkpoint file, to the repository `owner/name`; return its URL.

    The repository is created if it does not exist. Raises ValueError for a name of another form, without a
    token or a network, or if the upload fails.
    """
    if not HUB_ID.fullmatch(HUB + repo):
        raise ValueError(f"'{repo}' is not the name of a hub repository; give one of the form 'owner/name'.")
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise ValueError("You are not logged in to the hub. Log in with `hf auth login`, or set HF_TOKEN.")
    if not hub_answers():
        raise ValueError(
            "The Hugging Face hub cannot be reached (no network, or HF_HUB_OFFLINE is set), so nothing was "
            "uploaded. Try again with a network."
        )
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
            raise ValueError(
                f"The upload to '{repo}' failed: {describe_hub_error(error)}. Does your token permit to "
                "write there? Log in anew with `hf auth login`."
            ) from error
    return f"https://huggingface.co/{repo}"


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.push")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("repo", metavar="OWNER/NAME", help="hub repository, created if it does not exist")
    parser.add_argument("--public", action="store_true", help="create it public (default: private)")
    args = parser.parse_args(argv)
    say(f"Uploaded to {push_to_hub(args.run, args.repo, not args.public)}")


if __name__ == "__main__":
    with friendly_errors():
        main()
