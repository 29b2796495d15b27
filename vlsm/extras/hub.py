"""Checkpoints on the Hugging Face hub: `vlsm.push_to_hub(run, "owner/name")`, and
`vlsm.load("hub:owner/name")` to have one back.
"""

import tempfile
from pathlib import Path

from vlsm.checkpoint import HUB, HUB_ID, locate_checkpoint, read_metadata

FILE = "best.safetensors"
CARD = """---
library_name: vlsm
base_model: {weights}
tags: [image-segmentation, medical]
---
What `{method}` has learnt on `{dataset}` (best validation DSC {score}), for the frozen base `{weights}`
({model}): a checkpoint of the project vlsm, {size:.1f} MB. The base is not in it.

    model = vlsm.load("hub:{repo}")
    python evaluate.py --ckpt hub:{repo} --images DIR --prompt "..." --save-masks OUT

Options: `{options}`. Pictures of {image_size} x {image_size} pixels; prompts: {prompts}. Research software,
not a medical device.
"""


def push_to_hub(run, repo, private=True, token=None):
    """Upload a run's best checkpoint, or a checkpoint file, and a card to a hub repository `owner/name`; its
    URL.

    The repository is made if need be. Only the tuned tensors and the checkpoint's metadata travel (these name
    the folder of the data; look at them first with `vlsm.checkpoint.read_metadata`). Raises ValueError for a
    name that cannot be one.
    """
    if not HUB_ID.fullmatch(HUB + repo):
        raise ValueError(f"'{repo}' is no name of a hub repository; give one of the form 'owner/name'.")
    from huggingface_hub import HfApi

    file, about, api = locate_checkpoint(run), read_metadata(run), HfApi(token=token)
    score = about.get("best_val_dsc")
    names = ("weights", "method", "model", "dataset", "options", "image_size", "prompts")
    shown = {name: about.get(name, "unknown") for name in names}
    shown["dataset"] = Path(str(shown["dataset"])).name
    score = "unknown" if score is None else f"{100 * score:.1f} %"
    card = CARD.format(repo=repo, score=score, size=file.stat().st_size / 1e6, **shown)
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        (Path(folder) / FILE).write_bytes(file.read_bytes())
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A checkpoint of vlsm")
    return f"https://huggingface.co/{repo}"
