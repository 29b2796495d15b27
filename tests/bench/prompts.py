"""Many prompts of an image, which is encoded once, against one prompt; at real size, without gradients."""

import tempfile

import torch

import vlsm
from tests.bench.training import prompts_of, real_size
from vlsm.system.parallel import autocast

PROMPTS = 20


def bench_prompts(bench):
    for method in ("dense", "shallow"):
        with tempfile.TemporaryDirectory() as folder:
            real_size(folder)
            model = vlsm.build("clipseg", folder, method)
        dtype = None if bench.dtype == torch.float32 else bench.dtype
        model.place_on(bench.device, dtype)
        pixels = torch.randn(1, 3, 352, 352, device=bench.device)
        ids = prompts_of(PROMPTS, 14)

        @torch.inference_mode()
        def segment(count, model=model, dtype=dtype, pixels=pixels, ids=ids):
            with autocast(bench.device, dtype):
                return model(pixels, ids[:count])

        sides = dict(ours=lambda: segment(1), many=lambda: segment(PROMPTS))
        bench.row(f"prompts {method} vl: 1, then {PROMPTS} of an image", bench.time(sides, warm=1))
