"""Write a run with one prompt built in as an ONNX file, for programs without PyTorch.

Needs: pip install onnxscript onnxruntime. The file is written only if ONNX Runtime's logits equal PyTorch's
within 0.1 %.
"""

import json
import logging
import warnings

import torch
from torch import nn

from vlsm.checkpoint import load
from vlsm.system.arguments import Parser
from vlsm.system.console import friendly_errors, say
from vlsm.system.files import check_targets, owned_write

EXAMPLES = """examples:
  python -m vlsm.tools.export runs/kvasir-dense-64-seed42 --prompt "polyp" --out polyp.onnx
  python -m vlsm.tools.export hub:owner/polyps --prompt "a flat polyp" --out flat.onnx
  python -m vlsm.tools.export runs/ct --prompt "liver" --out liver.onnx --weights weights/clipseg"""
NEEDS = "onnxscript onnxruntime"
TOLERANCE = 1e-3  # between both programs' logits, as a share of the largest logit or of 1
DESCRIBED = ("model", "weights", "method", "dataset", "image_size")  # metadata in the file, with the prompt


class Segmenter(nn.Module):
    """A model with one prompt: pixels float32 `[B, 3, S, S]`, RGB, 0 to 255 -> logits `[B, 1, S, S]`."""

    def __init__(self, model, prompt):
        super().__init__()
        self.network = model.network
        self.tuner = model.tuner
        self.mean = 255 * torch.tensor(model.network.mean)[:, None, None]
        self.std = 255 * torch.tensor(model.network.std)[:, None, None]
        self.ids, self.mask = model.tokenizer()([prompt])
        self.text = None
        if not self.tuner.needs_image_embedding:  # the prompt is encoded once, for all images
            contexts = self.tuner.contexts().text
            with torch.no_grad():
                self.text = self.network.encode_prompts(self.ids, self.mask, self.tuner, contexts)

    def forward(self, pixels):
        """Segment images `[B, 3, S, S]` by the prompt -> logits `[B, 1, S, S]`."""
        B = pixels.shape[0]
        x = (pixels - self.mean) / self.std  # `normalise` has a loop over images, which would fix B
        text = None
        if self.text is not None:
            text = tuple(t.expand(B, *t.shape[1:]) for t in self.text)
        ids = self.ids.expand(B, -1)
        mask = self.mask.expand(B, -1)
        return self.network(x, ids, mask, self.tuner, text_features=text)


def export_program(segmenter, pixels):
    """Return PyTorch's ONNX program of a module that takes any number of images."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its own code
        return torch.onnx.export(
            segmenter, (pixels,), dynamo=True, verbose=False, input_names=["pixels"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip


@torch.no_grad()
def to_onnx(model, prompt, size, path, description):
    """Write a float32 model on the CPU with its prompt to an ONNX file for images of `size`.

    description: a dictionary that is stored in the file. Returns the largest difference between ONNX
    Runtime's logits and PyTorch's. Raises ValueError if packages are missing, or if the difference is larger
    than `TOLERANCE`; then nothing is written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError(f"ONNX files need packages that are not installed: pip install {NEEDS}.") from None
    segmenter = Segmenter(model.eval(), prompt).eval()
    generator = torch.Generator().manual_seed(0)
    traced = 255 * torch.rand(2, 3, size, size, generator=generator)
    checked = 255 * torch.rand(3, 3, size, size, generator=generator)  # another number of images
    expected = segmenter(checked)
    program = export_program(segmenter, traced)
    for name, value in description.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    with owned_write(path) as temporary:
        program.save(temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        logits = session.run(None, {"pixels": checked.numpy()})[0]
        difference = (torch.from_numpy(logits) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(expected.abs().max().item(), 1):  # NaN is refused, too
            raise ValueError(
                f"ONNX Runtime's logits differ from PyTorch's by up to {difference:.2g}, so '{path}' was not "
                "written."
            )
    return difference


def main(argv=None):
    parser = Parser(__doc__, EXAMPLES, prog="python -m vlsm.tools.export")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--prompt", required=True, help='what the file segments: "polyp"')
    parser.add_argument("--out", required=True, metavar="FILE.onnx", help="file to write")
    parser.add_argument("--weights", help="folder or hub id of the base, if it has moved")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that this program did not write"
    )
    args = parser.parse_args(argv)
    check_targets([args.out], overwrite=args.overwrite)
    model = load(args.run, args.weights)
    description = {name: model.metadata[name] for name in DESCRIBED}
    size = model.metadata["image_size"]
    difference = to_onnx(model, args.prompt, size, args.out, dict(description, prompt=args.prompt))
    say(
        f"Wrote '{args.out}' for \"{args.prompt}\".\n"
        f"ONNX Runtime's logits differ from PyTorch's by at most {difference:.1g}.\n"
        f"pixels float32 [batch, 3, {size}, {size}] (RGB, 0 to 255)\n"
        f"-> logits [batch, 1, {size}, {size}], foreground where above 0"
    )


if __name__ == "__main__":
    with friendly_errors():
        main()
