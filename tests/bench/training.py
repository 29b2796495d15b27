"""Whole training steps and epochs against the way the papers' own code takes them.

That way: the networks of published.py, prompts padded to 77 tokens (prompt learners: to the longest), autocast
(fp16 on a GPU, none in float32) over float32 weights, Dice and cross entropy in eager ops; images decoded and
resized by PIL in DataLoader workers in every epoch. Both sides hold the same weights; their losses must agree.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import datasets
import vlsm
from kernels import dice_bce_loss
from kernels.dice_bce import dice_bce_torch
from tests.bench.published import published_network
from vlsm.data.cache import device_batches, open_split
from vlsm.data.images import mask_image, read_mask
from vlsm.data.normalise import normalise
from vlsm.networks import transformer
from vlsm.networks.base import IMAGENET_MEAN, IMAGENET_STD
from vlsm.system.parallel import autocast
from vlsm.training.frozen_cache import FrozenCache

STEPS = ("dense vl", "shallow vl", "coop", "vpt")  # a row each


def real_size(folder):
    """A CLIPSeg of the published sizes with random weights, written to the folder by transformers."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    torch.manual_seed(0)
    config = CLIPSegConfig(
        vision_config=dict(patch_size=16),
        use_complex_transposed_convolution=True,
        attn_implementation="eager",
    )
    network = CLIPSegForImageSegmentation(config).eval()
    network.save_pretrained(folder)
    return network


def prompts_of(batch, limit=77):
    """Ids of prompts of 5 to 14 tokens, as long as MedVLSM's, padded to `limit` with the end token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((batch, limit), 49407)
    ids[:, 0] = 49406
    lengths = torch.randint(5, 15, (batch,), generator=generator).clamp(max=limit)
    for row, n in enumerate(lengths.tolist()):
        ids[row, 1 : n - 1] = torch.randint(1000, 40000, (n - 2,), generator=generator)
    return ids


def stepper(parameters, loss_of, device, scaler=None):
    """One training step, as a function: gradients, clipping, AdamW."""
    parameters = [p for p in parameters if p.requires_grad]
    fused = device.type == "cuda" and scaler is None
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=1e-3, fused=fused)

    def step(*inputs, **keywords):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(*inputs, **keywords)
        if scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            scaler.update()
        return loss

    return step


class Pair:
    """Our model and the published way, with the same weights, for one method; dtype: of products; compiled:
    --compile.
    """

    def __init__(self, device, dtype, folder, method, compiled="auto"):
        network = real_size(folder)
        self.device = device
        self.amp = None if dtype == torch.float32 else dtype
        self.model = vlsm.build("clipseg", folder, method)
        self.theirs = published_network(network, self.model.tuner, method).to(device)
        self.model.place_on(device, self.amp, compile_blocks=compiled)
        self.their_amp = torch.float16 if device.type == "cuda" and self.amp else self.amp
        scaler = torch.amp.GradScaler("cuda") if self.their_amp == torch.float16 else None
        self.our_step = stepper(self.model.tuned_parameters().values(), self.our_loss, device)
        self.their_step = stepper(self.theirs.parameters(), self.their_loss, device, scaler)

    def our_loss(self, pixels, ids, target, **kept):
        with autocast(self.device, self.amp):
            logits = self.model(pixels, ids, **kept)
        return dice_bce_loss(logits, target)

    def their_loss(self, pixels, ids, target, network=None):
        network = network or self.theirs
        with autocast(self.device, self.their_amp):
            logits = network(pixels, ids.to(self.device))
        return dice_bce_torch(logits, target)

    def agree(self, ours, theirs):
        """Raise AssertionError unless two losses are the same, as far as the precision allows."""
        difference = abs(ours.item() - theirs.item())
        # relative in half precision: a network of random weights has large losses
        bound = 1e-4 if self.amp is None else 1e-3 * abs(theirs.item())
        assert difference < bound, f"the losses differ: {ours.item()} and {theirs.item()}"
        return difference


def bench_step(bench, label):
    B = bench.batch_size
    method = label.split()[0]
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(bench.device, bench.dtype, folder, method)
    pixels = torch.randn(B, 3, 352, 352, device=bench.device)
    ids = prompts_of(B)
    if method in ("coop", "vpt"):  # the class word for all
        ids = prompts_of(1, 4).expand(B, -1)
    target = (torch.rand(B, 1, 352, 352, device=bench.device) < 0.2).to(torch.uint8)

    def ours():
        return pair.our_step(pixels, ids, target)

    def reference(network=None):
        return pair.their_step(pixels, ids, target, network=network)

    more = dict(loss_difference=pair.agree(ours(), reference()))
    sides = dict(ours=ours, reference=reference)
    if bench.cuda:
        for side, step in sides.items():
            torch.cuda.reset_peak_memory_stats()
            step()
            more[f"peak_GiB_{side}"] = torch.cuda.max_memory_allocated() / 2**30
        compiled = torch.compile(pair.theirs)
        sides["compile"] = lambda: reference(compiled)
    times = bench.time(sides, bench.step_runs, warm=1)
    more["images_per_second"] = B / times["ours"]
    more["limit_share"] = _limit(bench, ours) / times["ours"]
    bench.row(f"step {label}, batch {B}, 352 x 352", times, **more)
    if method in ("dense", "vpt") and not bench.cuda and pair.amp:
        sides = dict(ours=ours, fused=lambda: _with_fused_attention(ours))
        bench.row(f"step {label}, attention fused", bench.time(sides, bench.step_runs, warm=1))
    if method == "coop":  # as in epochs after the first, for images that augmentation leaves as they are
        with torch.no_grad(), autocast(bench.device, pair.amp):
            kept = pair.model.network.encode_image(pixels, pair.model.tuner)
        sides = dict(ours=lambda: pair.our_step(None, ids, target, image_features=kept), reference=reference)
        times = bench.time(sides, bench.step_runs, warm=1)
        bench.row(f"step {label}, image activations kept", times)


def _with_fused_attention(step):
    limit = transformer.WRITTEN_OUT
    transformer.WRITTEN_OUT = 0
    try:
        step()
    finally:
        transformer.WRITTEN_OUT = limit


def _limit(bench, step):
    """The seconds that a step's matrix products would take at the rate of one linear layer of real size,
    `[B x 485, 768] x [768, 3072]`, in this run.
    """
    rows = 485 * bench.batch_size
    x = torch.randn(rows, 768, device=bench.device).to(bench.dtype)
    w = torch.randn(3072, 768, device=bench.device).to(bench.dtype)
    seconds = bench.time(dict(linear=lambda: nn.functional.linear(x, w)), 30)["linear"]
    rate = 2 * rows * 768 * 3072 / seconds
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / rate


class PublishedDataset(Dataset):
    """Decode, resize and normalise a record by PIL, in every epoch anew."""

    def __init__(self, records, size):
        self.records = records
        self.size = (size, size)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        image = Image.open(self.records[i].image).convert("RGB").resize(self.size, Image.BILINEAR)
        mask = Image.open(self.records[i].mask).convert("L").resize(self.size, Image.NEAREST)
        mean = np.array(IMAGENET_MEAN)
        std = np.array(IMAGENET_STD)
        pixels = ((np.asarray(image) / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)
        target = (np.asarray(mask) > 127)[None].astype(np.float32)
        return torch.from_numpy(pixels), torch.from_numpy(target)


def training_records(bench, folder):
    """The first `--images` training records; the demo's are written to the folder, to have files to decode."""
    records = datasets.records(bench.dataset, "train", bench.data_root)[: bench.images]
    if bench.dataset != "demo":
        return records
    on_disk = []
    for i, record in enumerate(records):
        image = folder / f"image_{i}.png"
        mask = folder / f"mask_{i}.png"
        Image.fromarray(record.image).save(image)
        mask_image(read_mask(record.mask)).save(mask)
        on_disk.append(replace(record, image=image, mask=mask))
    return on_disk


def bench_cache(bench):
    """From the decode-once cache to normalised batches of 32."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = open_split(training_records(bench, folder), 352, folder / "cache", "bench")
        if bench.cuda:
            data.move_to(bench.device)
        rows = torch.randint(len(data), (32,)).tolist()

        def ours():
            images = data.batch(rows)[0]
            return normalise(images, IMAGENET_MEAN, IMAGENET_STD)

        times = bench.time(dict(ours=ours))
        bench.row("cache to normalised batch of 32", times, images_per_second=32 / times["ours"])


def bench_epoch(bench):
    """Epochs from disk after the first, which decodes: a published epoch decodes again, ours reads the cache."""
    for method in ("dense", "shallow"):
        with tempfile.TemporaryDirectory() as folder:
            _epoch(bench, method, Path(folder))


def _epoch(bench, method, folder):
    B = bench.batch_size
    device = bench.device
    pair = Pair(device, bench.dtype, folder, method)
    records = training_records(bench, folder)
    data = open_split(records, 352, folder / "cache", "bench")
    ids = prompts_of(B, 14)

    def tokenizer(prompts):
        return torch.stack([ids[int(p or 0)] for p in prompts]), None

    pair.model.tokenizer = lambda: tokenizer  # the network of random weights comes without one
    frozen = FrozenCache(pair.model, device, pair.amp, None, folder)
    frozen.add_split("bench", data, B)
    batches = [list(range(i, min(i + B, len(data)))) for i in range(0, len(data), B)]

    def our_loss(indices, images, masks):
        prompts = [str(k) for k in range(len(indices))]
        inputs = frozen.model_inputs("bench", indices, images, prompts)
        with autocast(device, pair.amp):
            logits = pair.model(*inputs)
        return dice_bce_loss(logits, masks)

    step = stepper(pair.model.tuned_parameters().values(), our_loss, device)
    dataset = PublishedDataset(records, 352)
    workers = min(4, os.cpu_count())
    loader = DataLoader(dataset, B, num_workers=workers, persistent_workers=True, pin_memory=bench.cuda)

    def ours():
        for batch in device_batches(data, batches, device, frozen.needs_pixels("bench")):
            step(*batch)

    def reference():
        for pixels, masks in loader:
            pair.their_step(pixels.to(device), prompts_of(len(pixels)), masks.to(device))

    times = bench.time(dict(ours=ours, reference=reference), bench.epoch_runs, warm=1)
    rates = {f"images_per_second_{side}": len(data) / seconds for side, seconds in times.items()}
    bench.row(f"epoch {method} vl of {len(data)} images, after the first", times, **rates)
