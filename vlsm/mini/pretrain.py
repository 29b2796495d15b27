"""Pre-training of the embedded base from scratch on procedural scenes (scenes.py): `python -m
vlsm.mini.pretrain --out DIR`.

Dice and cross entropy alone leave the network deaf to its prompt for a long time: it segments every object.
So an auxiliary loss aligns the projected patch tokens with the phrase's embedding, as CLIP aligns images with
captions. Each scene's image is encoded once for its three phrases. Run again with the same --out, it goes on
where it was stopped.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from tqdm import tqdm

import kernels
from vlsm.checkpoint import load_state, save_state
from vlsm.data.pixel_values import normalise
from vlsm.metrics import dsc
from vlsm.mini import scenes
from vlsm.networks.base import IMAGENET_MEAN, IMAGENET_STD, ImageFeatures
from vlsm.networks.clipseg import CLIPSeg, CLIPSegConfig
from vlsm.networks.hooks import Tuner
from vlsm.networks.tokenizer import END, START, Tokenizer, clip_bpe
from vlsm.system.files import atomic_write, is_filled, write_json, write_text

CONFIG = dict(
    model_type="clipseg",
    architectures=["CLIPSegForImageSegmentation"],
    projection_dim=96,
    extract_layers=[1, 2, 3],
    reduce_dim=64,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=128,
    text_config=dict(
        model_type="clipseg_text_model", hidden_size=96, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=77,
    ),
    vision_config=dict(
        model_type="clipseg_vision_model", hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, image_size=scenes.SIDE, patch_size=8,
    ),
)  # fmt: skip
SAVE_EVERY = 250  # steps
# Words of medical prompts that scenes do not use, so that each is one token for whoever fine-tunes.
MEDICAL_WORDS = """
polyp polyps lesion lesions tumor tumour benign malignant ulcer ulcers foot skin melanoma nevus heart left
right ventricular ventricle myocardium atrium cavity chest xray lung breast ultrasound image cardiac colon
rectum tissue growth lump wound cancer mass nodule abnormal which is are a an the of in on at with no not
and or normal flesh flat raised bumpy projecting mushroom stalk lining often resemble located center top
bottom left right small medium large tiny huge round oval circular irregular spot spots dark light bright
pale red pink white yellow brown orange purple black gray dotted smooth shiny four five six seven eight nine
ten many region area border mucosa wall fold cell cells nucleus gland organ kidney liver bone brain vessel
artery vein retina optic disc cup fluid opacity effusion pleural other enlarged cardiomediastinum
pneumothorax edema consolidation atelectasis support devices cardiomegaly rectangular triangle square shaped
"""


def make_tokenizer(folder, size=1400):
    """Write vocab.json and merges.txt of a small CLIP tokenizer that holds the scenes' words and common
    medical ones whole.
    """
    corpus = [text for i in range(4000) for text in scenes.sample(7, i)[1]] + MEDICAL_WORDS.split() * 50
    trained = clip_bpe(BPE(unk_token=END, end_of_word_suffix="</w>"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    merges = [
        m if isinstance(m, list) else m.split(" ") for m in json.loads(trained.to_str())["model"]["merges"]
    ]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges] + [START, END]
    write_text(
        folder / "vocab.json",
        json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}, ensure_ascii=False),
    )
    write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    about = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=77,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    write_json(folder / "tokenizer_config.json", about)


def initialise(base):
    """Set a random start, with sines of the place as the patches' positions: "left" is learnt sooner."""
    base.initialise()
    vision = base.clip.vision_model.embeddings
    side, width = (
        base.config.vision.image_size // base.config.vision.patch_size,
        base.config.vision.hidden_size,
    )
    place = (torch.arange(side) + 0.5) / side
    waves = torch.pi * place[:, None] * 2.0 ** torch.linspace(-1, 3, width // 4)  # [side, width / 4]
    line = torch.cat([waves.sin(), waves.cos()], 1)  # [side, width / 2]
    grid = torch.cat([line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)], 2)
    with torch.no_grad():
        vision.position_embedding.weight[1:] = 0.3 * grid.flatten(0, 1)


class Scenes(torch.utils.data.Dataset):
    """Batch `i` of a seed: pictures uint8 `[B, S, S, 3]`, 3 B phrases, masks bool `[3 B, 1, S, S]`."""

    def __init__(self, seed, batch, count):
        self.seed, self.batch, self.count = seed, batch, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        pictures, phrases, masks = zip(
            *(scenes.sample(self.seed, i * self.batch + j) for j in range(self.batch))
        )
        pictures, masks = (torch.stack([torch.from_numpy(x) for x in xs]) for xs in (pictures, masks))
        return pictures, [p for three in phrases for p in three], masks.flatten(0, 1)[:, None]


def alignment_loss(base, tokens, cond, masks):
    """Return the loss of the cosines of each projected patch token and each phrase, as logits for the
    phrase's mask at patch resolution.
    """
    clip = base.clip
    patches = clip.visual_projection(clip.vision_model.post_layernorm(tokens[:, 1:]))
    patches = F.normalize(patches, dim=-1)  # [B, N, P]
    cond = F.normalize(cond, dim=-1).unflatten(0, (len(tokens), -1))  # [B, 3, P]
    logits = clip.logit_scale.exp() * (cond @ patches.mT - 0.5)  # [B, 3, N]; a cosine above 0.5 means "here"
    cover = F.avg_pool2d(masks.float(), base.config.vision.patch_size).flatten(1).view_as(logits)
    return F.binary_cross_entropy_with_logits(logits, cover)


def step_loss(network, tokenizer, batch):
    """Return the loss of a batch of `Scenes`; each image is encoded once for its three phrases."""
    pictures, phrases, masks = batch
    tuner, device = Tuner(), network.clip.logit_scale.device
    # padding follows the end of a phrase, where it hides nothing
    text = network.encode_text(tokenizer(phrases)[0], None, tuner)
    pixel_values = normalise(pictures.permute(0, 3, 1, 2).to(device), network.mean, network.std)
    image = network.encode_image(pixel_values, tuner)
    thrice = ImageFeatures([a.repeat_interleave(3, 0) for a in image.activations], None, image.size)
    logits = network(None, None, image_features=thrice, text_features=text)
    masks = masks.to(device)
    # smooth=1 pixel gives empty masks a Dice gradient too
    segmentation = kernels.dice_bce_loss(logits, masks, 1.0, 1.0, smooth=1.0)
    return segmentation + alignment_loss(network, image.activations[-1], text[0], masks)


@torch.no_grad()
def listening(base, tokenizer, seed, count):
    """Return the mean DSC on `count` scenes, with the right phrase, and with another object's phrase against
    the first object's mask.
    """
    right, wrong, index, found = [], [], 0, 0
    while found < count:
        pairs = []
        while len(pairs) < 50 and found < count:
            pair, index = scenes.distinct_pair(seed, index), index + 1
            if pair:
                pairs.append(pair)
                found += 1
        pictures = torch.stack([torch.from_numpy(p[0]) for p in pairs]).permute(0, 3, 1, 2)
        pixels = normalise(pictures, base.mean, base.std)
        truth = torch.stack([torch.from_numpy(p[1][1]) for p in pairs])
        for which, scores in ((1, right), (2, wrong)):
            predicted = base(pixels, *tokenizer([p[which][0] for p in pairs]))[:, 0] > 0
            scores.append(dsc(predicted, truth))
    return torch.cat(right).mean().item(), torch.cat(wrong).mean().item()


def schedule(step, steps, peak):
    """Return the learning rate: a linear warm-up over 300 steps, then a cosine to 1 % of the peak."""
    return peak * min((step + 1) / 300, 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def export(out, base):
    """Write the Hugging Face folder, without the optimizer's state."""
    with atomic_write(out / "model.safetensors") as temporary:
        save_file(
            {k: v.detach().contiguous() for k, v in base.state_dict().items()}, temporary, {"format": "pt"}
        )


def prepare(out):
    """Write the configuration and tokenizer of a new run; returns (network with fresh weights, tokenizer)."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "vocab.json").is_file():
        make_tokenizer(out)
    tokenizer = Tokenizer(out)
    ids = dict(bos_token_id=tokenizer.start, eos_token_id=tokenizer.end, pad_token_id=tokenizer.end)
    CONFIG["text_config"].update(vocab_size=tokenizer.fast.get_vocab_size(), **ids)
    write_json(out / "config.json", CONFIG)
    processor = dict(
        image_processor_type="ViTImageProcessor", do_resize=True, do_rescale=True, do_normalize=True
    )
    processor.update(
        size=dict(height=scenes.SIDE, width=scenes.SIDE), image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    write_json(out / "preprocessor_config.json", processor)
    base = CLIPSeg(CLIPSegConfig.from_dict(CONFIG))
    initialise(base)
    return base, tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write the base to (and to resume from)"
    )
    parser.add_argument("--steps", type=int, default=2700, help="training steps (default %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="scenes a step, three phrases each (default %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if is_filled(args.out) and not (args.out / "state.pt").is_file():
        parser.error(f"'{args.out}' holds no pre-training to go on with (state.pt); name another folder")
    torch.manual_seed(args.seed)
    base, tokenizer = prepare(args.out)
    base.to(args.device).train()
    optimizer = torch.optim.AdamW(base.parameters(), lr=args.lr, weight_decay=0.05, betas=(0.9, 0.98))
    first, state_file = 0, args.out / "state.pt"
    if state_file.is_file():
        state = load_state(state_file)
        base.load_state_dict(state["base"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    data = Scenes(args.seed, args.batch_size, args.steps)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, sampler=range(first, args.steps), num_workers=1, prefetch_factor=8
    )
    bar, began, mean = (
        tqdm(loader, initial=first, total=args.steps, unit="step", mininterval=10),
        time.time(),
        None,
    )
    for step, batch in enumerate(bar, first):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, args.steps, args.lr)
        loss = step_loss(base, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_state(
                state_file, dict(base=base.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            )
            export(args.out, base)
            base.eval()
            right, wrong = listening(
                base.cpu(), tokenizer, args.seed + 1, 1000 if step + 1 == args.steps else 100
            )
            base.to(args.device).train()
            rate = (step + 1 - first) * args.batch_size / (time.time() - began)
            scores = f"DSC right phrase {100 * right:.1f}, other phrase {100 * wrong:.1f}"
            tqdm.write(f"step {step + 1}: loss {mean:.3f}, {scores}, {rate:.0f} scenes/s")


if __name__ == "__main__":
    main()
