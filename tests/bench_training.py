"""Whole training steps and epochs against the way the papers' own code takes them; rows of bench.py.

That way: transformers' CLIPSeg modules in eager mode with eager attention, all 12 blocks of both encoders,
prompts padded to 77 tokens (prompt learners: to the longest), each encoded, an adapter as two Linears and two
ReLUs, the upsampler as a convolution of the enlarged features, autocast (fp16 on a GPU, none in float32) over
float32 weights, Dice and cross entropy in eager ops; pictures decoded and resized by PIL in DataLoader
workers at each epoch. Both sides hold the same weights; their losses must agree.
"""

import copy
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import datasets
import vlsm
from kernels import dice_bce_loss
from kernels.dice_bce import reference as loss_reference
from tests.conftest import write_demo
from vlsm.data.cache import device_batches, open_split
from vlsm.data.pixel_values import normalise
from vlsm.networks import transformer
from vlsm.networks.base import IMAGENET_MEAN, IMAGENET_STD
from vlsm.system.device import autocast
from vlsm.training.frozen_cache import FrozenCache


class ReferenceAdapter(nn.Module):
    """x + relu(up(relu(down(x)))), with another adapter's weights."""

    def __init__(self, ours):
        super().__init__()
        self.down, self.up = nn.Linear(*ours.down.weight.shape[::-1]), nn.Linear(*ours.up.weight.shape[::-1])
        self.load_state_dict(ours.state_dict())

    def forward(self, x):
        return x + self.up(self.down(x).relu()).relu()


class Reference(nn.Module):
    """CLIPSeg of transformers with the adapters of one of our tuners (dense vl or shallow vl), run as the
    papers' code runs it.
    """

    def __init__(self, network, tuner, method):
        super().__init__()
        self.network, self.method = network.requires_grad_(False), method
        if method == "dense":
            places = [
                getattr(tuner, b)[i][s]
                for b in ("vision", "text")
                for i in getattr(tuner, b)
                for s in ("attn", "mlp")
            ]
            self.n = len(tuner.vision)
        else:
            places = [getattr(tuner, b)[k] for b in ("vision", "text") for k in getattr(tuner, b)]
        self.adapters = nn.ModuleList(ReferenceAdapter(p) for p in places)

    def encode(self, model, x, mask, adapters=(), contexts=(), at=0):
        states = []
        for i, layer in enumerate(model.encoder.layers):
            a, b = (
                adapters[2 * i : 2 * i + 2] if self.method == "dense" and i < self.n else (nn.Identity(),) * 2
            )
            x = x + a(layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=mask)[0])
            x = x + b(layer.mlp(layer.layer_norm2(x)))
            if i + 1 < len(contexts):
                x = join(x, at, contexts[i + 1], contexts.shape[1])
            states.append(x)
        return states

    def towers(self):
        clip = self.network.clip
        return (
            getattr(m, name, m)
            for m, name in ((clip.vision_model, "vision_model"), (clip.text_model, "text_model"))
        )

    def forward(self, pixel_values, input_ids):
        clip, wanted = self.network.clip, self.network.config.extract_layers
        vision, text = self.towers()
        half = len(self.adapters) // 2
        x = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))
        states = self.encode(vision, x, None, self.adapters[:half])
        vision.post_layernorm(states[-1][:, 0])
        activations = [states[i] for i in wanted]
        T = input_ids.shape[1]
        causal = torch.full((T, T), torch.finfo(torch.float32).min, device=input_ids.device).triu(1)[
            None, None
        ]
        states = self.encode(text, text.embeddings(input_ids=input_ids), causal, self.adapters[half:])
        row, end = torch.arange(len(input_ids), device=input_ids.device), input_ids.argmax(1)
        cond = clip.text_projection(text.final_layer_norm(states[-1])[row, end])
        if self.method == "shallow":
            activations = [a(x) for a, x in zip(self.adapters[:half], activations)]
            cond = cond + sum(a(states[i][row, end]) for a, i in zip(self.adapters[half:], wanted))
        return self.network.decoder(tuple(activations), cond).logits[:, None]


def join(x, at, vectors, over):
    """Tokens x with vectors at a position, in the place of `over` tokens."""
    return torch.cat([x[:, :at], vectors.expand(len(x), -1, -1), x[:, at + over :]], 1)


class ReferenceLearner(Reference):
    """The same with CoOp or VPT and the learnable upsampler, as the papers define them."""

    def __init__(self, network, tuner, method):
        nn.Module.__init__(self)
        self.network, self.method = network.requires_grad_(False), method
        self.context, self.upsampler = (
            nn.Parameter(tuner.context.detach().clone()),
            copy.deepcopy(tuner.upsampler),
        )

    def forward(self, pixel_values, input_ids):
        clip, decoder, (vision, text) = self.network.clip, self.network.decoder, self.towers()
        x, t = (
            vision.embeddings(pixel_values, interpolate_pos_encoding=True),
            text.embeddings.token_embedding(input_ids),
        )
        N, n = x.shape[1], self.context.shape[1]
        in_vision, in_text = (self.context if self.method == m else () for m in ("vpt", "coop"))
        x = join(x, N, in_vision[0], 0) if len(in_vision) else x
        states = self.encode(vision, vision.pre_layrnorm(x), None, contexts=in_vision, at=N)
        t = join(t, 1, in_text[0], 0) if len(in_text) else t
        S = t.shape[1]
        causal = torch.full((S, S), torch.finfo(torch.float32).min, device=t.device).triu(1)[None, None]
        t = self.encode(
            text, t + text.embeddings.position_embedding.weight[:S], causal, contexts=in_text, at=1
        )[-1]
        end = input_ids.argmax(1) + (n if len(in_text) else 0)
        cond = clip.text_projection(text.final_layer_norm(t)[torch.arange(len(t), device=t.device), end])
        z = 0
        for k, (i, reduce, layer) in enumerate(
            zip(self.network.config.extract_layers[::-1], decoder.reduces, decoder.layers)
        ):
            z = z + reduce(states[i])
            z = (
                decoder.film_mul(cond)[:, None] * z + decoder.film_add(cond)[:, None]
                if k == decoder.conditional_layer
                else z
            )
            z = layer(z, attention_mask=None)
        side = round((N - 1) ** 0.5)
        z = z[:, 1:N].transpose(1, 2).unflatten(2, (side, side))
        up = self.upsampler
        risen = up.conv(
            nn.functional.interpolate(z, scale_factor=up.factor, mode="bilinear", align_corners=False)
        )
        return (1 - up.ratio) * decoder.transposed_convolution(z) + up.ratio * risen


def real_size(folder):
    """A CLIPSeg of the published sizes with random weights, written by transformers: (its network, the
    folder).
    """
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
    """Ids of prompts of 5 to 14 tokens, as MedVLSM's are long, padded to `limit` with the end token."""
    g = torch.Generator().manual_seed(1)
    ids = torch.full((batch, limit), 49407)
    ids[:, 0] = 49406
    for row, n in enumerate(torch.randint(5, 15, (batch,), generator=g).clamp(max=limit).tolist()):
        ids[row, 1 : n - 1] = torch.randint(1000, 40000, (n - 2,), generator=g)
    return ids


def stepper(parameters, loss_of, device, scaler=None):
    """One training step, as a function: gradients, clipping, AdamW."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-5, weight_decay=1e-3, fused=device.type == "cuda" and scaler is None
    )

    def step(*inputs, **how):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(*inputs, **how)
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
    """Our model and the reference, with the same weights, for one method."""

    def __init__(self, bench, folder, method):

        network = real_size(folder)
        self.device, amp = bench.device, None if bench.dtype == torch.float32 else bench.dtype
        self.model = vlsm.build("clipseg", folder, method)
        theirs = (Reference if method in ("dense", "shallow") else ReferenceLearner)(
            network, self.model.tuner, method
        ).to(self.device)
        self.amp, self.theirs = amp, theirs
        self.model.place_on(self.device, amp)
        their_amp = torch.float16 if bench.cuda and amp else amp
        scaler = torch.amp.GradScaler("cuda") if their_amp == torch.float16 else None

        def their_loss(pixels, ids, target, network=theirs):
            with autocast(self.device, their_amp):
                logits = network(pixels, ids.to(self.device))
            return loss_reference(logits, target)

        def our_loss(pixels, ids, target):
            with autocast(self.device, amp):
                logits = self.model(pixels, ids)
            return dice_bce_loss(logits, target)

        self.their_step = stepper(
            [p for p in theirs.parameters() if p.requires_grad], their_loss, self.device, scaler
        )
        self.our_step = stepper(self.model.tuned_parameters().values(), our_loss, self.device)

    def agree(self, ours, theirs):
        """Raise AssertionError unless two losses are the same, as far as the precision goes."""
        difference = abs(ours.item() - theirs.item())
        bound = (
            1e-4 if self.amp is None else 1e-3 * abs(theirs.item())
        )  # a network of random weights has large losses
        assert difference < bound, f"the losses differ: {ours.item()} and {theirs.item()}"
        return difference


def bench_step(bench):
    for method in ("dense vl", "shallow vl", "coop", "vpt"):
        _step(bench, method)


def _step(bench, label):

    B, method = bench.args.batch_size, label.split()[0]
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(bench, folder, method)
    pixels, ids = torch.randn(B, 3, 352, 352, device=bench.device), prompts_of(B)
    if method in ("coop", "vpt"):  # the class word for all
        ids = prompts_of(1, 4).expand(B, -1)
    target = (torch.rand(B, 1, 352, 352, device=bench.device) < 0.2).to(torch.uint8)
    inputs = (pixels, ids, target)
    difference = pair.agree(pair.our_step(*inputs), pair.their_step(*inputs))
    peaks = {}
    for name, step in (("ours", pair.our_step), ("reference", pair.their_step)) if bench.cuda else ():
        torch.cuda.reset_peak_memory_stats()
        step(*inputs)
        peaks[f"peak_GiB_{name}"] = torch.cuda.max_memory_allocated() / 2**30
    found = dict(ours=lambda: pair.our_step(*inputs), reference=lambda: pair.their_step(*inputs))
    if bench.cuda:
        compiled = torch.compile(pair.theirs)
        found["compile"] = lambda: pair.their_step(*inputs, network=compiled)
    times = bench.time(found, bench.args.step_runs, warm=1)
    more = dict(images_per_second=B / times["ours"], loss_difference=difference, **peaks)
    more["limit_share"] = _limit(bench, lambda: pair.our_step(*inputs)) / times["ours"]
    bench.row(f"step {label}, batch {B}, 352 x 352", times, **more)
    if method in ("dense", "vpt") and not bench.cuda and pair.amp:
        limit = transformer.WRITTEN_OUT

        def fused():
            transformer.WRITTEN_OUT = 0
            pair.our_step(*inputs)
            transformer.WRITTEN_OUT = limit

        both = dict(ours=found["ours"], fused=fused)
        bench.row(f"step {label}, attention fused", bench.time(both, bench.args.step_runs, warm=1))
    if method == "coop":  # as in epochs after the first, for pictures that augmentation leaves as they are
        with torch.no_grad(), autocast(bench.device, pair.amp):
            kept = pair.model.network.encode_image(pixels, pair.model.tuner)

        def loss_of_kept(ids, target):
            with autocast(bench.device, pair.amp):
                return dice_bce_loss(pair.model(None, ids, image_features=kept), target)

        step = stepper(pair.model.tuned_parameters().values(), loss_of_kept, bench.device)
        found = dict(ours=lambda: step(ids, target), reference=found["reference"])
        bench.row(f"step {label}, image activations kept", bench.time(found, bench.args.step_runs, warm=1))


def _limit(bench, step):
    """Return the seconds that a step's matrix products would take at the rate of one linear layer of real
    size, `[4 x 485, 768] x [768, 3072]`, in this run.
    """
    rows = 485 * bench.args.batch_size
    x, w = torch.randn(rows, 768, device=bench.device), torch.randn(3072, 768, device=bench.device)
    x, w = x.to(bench.dtype), w.to(bench.dtype)
    seconds = bench.time(dict(linear=lambda: torch.nn.functional.linear(x, w)), 30)["linear"]
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / (2 * rows * 768 * 3072 / seconds)


class Pictures(Dataset):
    """Decode, resize and normalise a record by PIL, at each epoch anew."""

    def __init__(self, records, size):
        self.records, self.size = records, size

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        from PIL import Image

        image = Image.open(self.records[i].image).convert("RGB").resize((self.size,) * 2, Image.BILINEAR)
        mask = Image.open(self.records[i].mask).convert("L").resize((self.size,) * 2, Image.NEAREST)
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        pixels = ((np.asarray(image) / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)
        return torch.from_numpy(pixels), torch.from_numpy((np.asarray(mask) > 127)[None].astype(np.float32))


def some_records(bench, folder):
    """The first `--images` training records of the data set; the demo is written to a folder, so that there
    is something to decode.
    """

    args = bench.args
    if args.dataset == "demo":
        write_demo(Path(folder) / "demo")
        return datasets.records(str(Path(folder) / "demo"), "train")[: args.images]
    return datasets.records(args.dataset, "train", args.data_root)[: args.images]


def bench_cache(bench):
    """From the decode-once cache to normalised batches of 32."""

    with tempfile.TemporaryDirectory() as folder:
        data = open_split(some_records(bench, folder), 352, Path(folder) / "cache", "bench")
        if bench.cuda:
            data.move_to(bench.device)
        rows = torch.randint(len(data), (32,)).tolist()
        t = bench.time(dict(ours=lambda: normalise(data.batch(rows)[0], IMAGENET_MEAN, IMAGENET_STD)))
        bench.row("cache to normalised batch of 32", t, images_per_second=32 / t["ours"])


def bench_epoch(bench):
    """Epochs from disk after the first, which decodes: a reference epoch decodes again, ours reads the cache."""
    for method in ("dense", "shallow"):
        with tempfile.TemporaryDirectory() as folder:
            _epoch(bench, method, Path(folder))


def _epoch(bench, method, folder):

    B, device = bench.args.batch_size, bench.device
    pair, records, ids = Pair(bench, folder, method), some_records(bench, folder), prompts_of(B, 14)
    data = open_split(records, 352, folder / "cache", "bench")

    def normaliser(images):
        return normalise(images, IMAGENET_MEAN, IMAGENET_STD)

    def tokenizer(prompts):
        return torch.stack([ids[int(p or 0)] for p in prompts]), None

    frozen = FrozenCache(pair.model, tokenizer, normaliser, device, pair.amp, None, folder)
    frozen.add_split("bench", data, B)
    batches = [list(range(i, min(i + B, len(data)))) for i in range(0, len(data), B)]

    def our_loss(indices, images, masks):
        prompts = [str(k) for k in range(len(indices))]
        pixel_values = None if images is None else normaliser(images)
        kept = frozen.lookup("bench", indices, prompts, pixel_values)
        with autocast(device, pair.amp):
            logits = pair.model(pixel_values, *tokenizer(prompts), **kept)
        return dice_bce_loss(logits, masks)

    step = stepper(pair.model.tuned_parameters().values(), our_loss, device)
    workers = min(4, os.cpu_count())
    loader = DataLoader(
        Pictures(records, 352), B, num_workers=workers, persistent_workers=True, pin_memory=bench.cuda
    )

    def ours():
        for batch in device_batches(data, batches, device, frozen.needs_pixels("bench")):
            step(*batch)

    def theirs():
        for pixels, masks in loader:
            pair.their_step(pixels.to(device), prompts_of(len(pixels)), masks.to(device))

    times = bench.time(dict(ours=ours, reference=theirs), bench.args.epoch_runs, warm=1)
    rates = {f"images_per_second_{side}": len(data) / t for side, t in times.items()}
    bench.row(f"epoch {method} vl of {len(data)} pictures, after the first", times, **rates)


ROWS = dict(cache=bench_cache, step=bench_step, epoch=bench_epoch)
