"""A page to try pictures and prompts on: `python evaluate.py --serve --ckpt RUN ...`, by gradio.

Uploads lie in gradio's temporary folder for ten minutes; nothing else is written but what a visitor saves, in
the visitor's own browser.
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

from vlsm.data.images import mask_image, resize_image
from vlsm.results.figures import CYAN, overlay
from vlsm.results.predict import Predictor, logits_at_size

LARGEST = 20 * 1024 * 1024  # bytes of an uploaded picture
TITLE = "What does the prompt call up?"


def _gradio():
    try:
        import gradio
    except ImportError:
        raise ValueError("--serve needs the package gradio: pip install gradio.") from None
    return gradio


class Predictors:
    """The runs that can be chosen, each loaded when it is first asked for: {shown name: checkpoint}."""

    def __init__(self, names, options):
        self.names, self.options, self.loaded = names, options, {}

    def get(self, name):
        """Return the `Predictor` of a run. Raises as `load`, KeyError for a name that is not there."""
        if name not in self.loaded:
            self.loaded[name] = Predictor(self.names[name], self.options, self.options.weights)
        return self.loaded[name]

    def probability(self, name, image, prompt):
        """Return the probability of the foreground, float32 `[H, W]`, of an image uint8 `[H, W, 3]`."""
        predictor = self.get(name)
        small = torch.from_numpy(resize_image(image, predictor.size).transpose(2, 0, 1).copy())
        logits = predictor.logits(small[None], [prompt])[0]
        return logits_at_size(logits, image.shape[:2]).sigmoid().cpu().numpy()


def segment(predictors, run, image, prompt, threshold):
    """Return what the page shows: (picture with the mask, probability in grey, share in words, mask)."""
    if image is None or not prompt.strip():
        return None, None, "Choose a picture and say what to segment.", None
    probability = predictors.probability(run, image, prompt)
    mask = probability >= threshold
    share = f"{100 * mask.mean():.1f} % of the picture; highest probability {probability.max():.3f}"
    grey = Image.fromarray((255 * probability).round().astype(np.uint8))
    return Image.fromarray(overlay(image, mask, CYAN)), grey, share, mask_image(mask)


def build_page(predictors, shown=()):
    """Return the gradio page for some `Predictors`; two prompts side by side.

    shown: (picture uint8 `[H, W, 3]`, prompt) of examples to choose from. Raises ValueError where gradio is
    not installed.
    """
    gradio = _gradio()
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.Markdown(f"## {TITLE}\nDrop a picture, type a prompt. Not a medical device.")
        with gradio.Row():
            run = gradio.Dropdown(list(predictors.names), value=next(iter(predictors.names)), label="run")
            threshold = gradio.Slider(0.01, 0.99, 0.5, step=0.01, label="threshold of the probability")
        image = gradio.Image(
            type="numpy", image_mode="RGB", sources=["upload", "clipboard"], label="picture", height=260
        )
        columns = []
        with gradio.Row():
            for title in ("prompt", "another prompt beside it"):
                with gradio.Column():
                    prompt = gradio.Textbox(label=title, max_length=1000)
                    drawn, grey, saved = (
                        gradio.Image(
                            label=name,
                            format="png",
                            interactive=False,
                            height=260,
                            buttons=["download", "fullscreen"],
                        )
                        for name in ("mask on the picture", "probability", "mask, to save")
                    )
                    said = gradio.Textbox(label="foreground", interactive=False)
                    columns.append((prompt, [drawn, grey, said, saved]))
        if shown:

            def choose(event: gradio.SelectData):
                return shown[event.index]

            pictures = [pixels for pixels, _ in shown]
            gallery = gradio.Gallery(
                pictures, label="of the test split", columns=8, height=180, allow_preview=False
            )
            gallery.select(choose, None, [image, columns[0][0]])
        for prompt, outputs in columns:
            events = [prompt.submit, image.change, threshold.release, run.change]
            gradio.on(events, partial(segment, predictors), [run, image, prompt, threshold], outputs)
    return page


def serve(predictors, shown):
    """Serve the page until it is interrupted, to this machine alone unless --share-host says otherwise."""
    page, options = build_page(predictors, shown), predictors.options
    page.queue(max_size=16, default_concurrency_limit=1)
    page.launch(
        server_name=options.share_host, server_port=options.port or None, share=False, quiet=True,
        max_file_size=LARGEST, show_error=True,
    )  # fmt: skip
