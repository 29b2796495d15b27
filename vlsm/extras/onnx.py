"""A tuned network with one prompt built in, as an ONNX file for programs without PyTorch."""

import json
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from vlsm.system.files import owned_write

NEEDS = "onnxscript onnxruntime"
TOLERANCE = 1e-3  # between ONNX Runtime's and PyTorch's logits, in parts of the largest or of 1


class Segmenter(nn.Module):
    """A model that segments one thing.

    pixels: float32 `[B, 3, S, S]`, RGB, 0 to 255; logits `[B, 1, S, S]`.
    """

    def __init__(self, model, prompt):
        super().__init__()
        self.base, self.tuner, self.text_count = model.network, model.tuner, 0
        for name, values in (("mean", model.network.mean), ("std", model.network.std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None])
        for name, value in zip(("ids", "mask"), model.tokenizer()([prompt])):
            self.register_buffer(name, value)
        if not self.tuner.needs_image_embedding:  # the prompt means the same for every image
            with torch.no_grad():
                text = self.base.encode_prompts(self.ids, self.mask, self.tuner, self.tuner.contexts().text)
            self.text_count = len(text)
            for k, value in enumerate(text):
                self.register_buffer(f"text{k}", value)

    def forward(self, pixels):
        x = (pixels - self.mean) / self.std  # `normalise` goes image by image, which would fix their number
        B, text = x.shape[0], None
        if self.text_count:
            buffers = (getattr(self, f"text{k}") for k in range(self.text_count))
            text = tuple(t.expand(B, *t.shape[1:]) for t in buffers)
        return self.base(x, self.ids.expand(B, -1), self.mask.expand(B, -1), self.tuner, text_features=text)


@torch.no_grad()
def to_onnx(model, prompt, size, path, about):
    """Write a float32 model on the CPU with its prompt to an ONNX file for images of `size`.

    about: what the file says of itself, a dictionary. Returns the largest difference between ONNX Runtime's
    logits and PyTorch's. Raises ValueError where packages are missing or the two differ by more than
    `TOLERANCE`; then nothing is written.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError(f"--export needs packages that are not here: pip install {NEEDS}.") from None
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(f"--export needs PyTorch 2.7 or newer, and this is {torch.__version__}.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    network, generator = Segmenter(model.eval(), prompt).eval(), torch.Generator().manual_seed(0)
    two, three = (255 * torch.rand(n, 3, size, size, generator=generator) for n in (2, 3))
    want = network(three)
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        program = torch.onnx.export(
            network, (two,), dynamo=True, verbose=False, input_names=["pixels"], output_names=["logits"],
            dynamic_shapes=(batch,),
        )  # fmt: skip
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    program.model.metadata_props.update(texts)
    with owned_write(Path(path)) as temporary:
        program.save(temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"pixels": three.numpy()})[0])
        gap = (found - want).abs().max().item()
        if not gap <= TOLERANCE * max(want.abs().max().item(), 1):
            raise ValueError(
                f"ONNX Runtime's logits differ from PyTorch's by up to {gap:.2g}, so '{path}' was not "
                "written."
            )
    return gap
