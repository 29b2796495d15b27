"""Serve a page to try images and prompts on, by gradio (pip install gradio).

Uploads stay in gradio's temporary folder for ten minutes; the program writes no other files.
"""

from functools import partial

import numpy as np
from PIL import Image

from datasets import open_run_split
from vlsm.data.cache import default_cache
from vlsm.data.images import mask_image, read_image
from vlsm.results.figures import PREDICTION, overlay
from vlsm.results.predict import load_predictor, logits_at_size
from vlsm.segment import prompt_notice, to_batch
from vlsm.system.arguments import Parser, number
from vlsm.system.console import friendly_errors, say

EXAMPLE = "example:\n  python -m vlsm.tools.serve runs/kvasir-dense-64-seed42 runs/kvasir-coop-seed42"
EXAMPLES = 24  # images of the test split
LARGEST_UPLOAD = 20 * 1024 * 1024  # bytes
TITLE = "Segment an image by a prompt"


class Runs:
    """The runs to choose from, each loaded when it is first asked for; they share the first one's base.

    settings: of `load_predictor`.
    """

    def __init__(self, paths, **settings):
        self.predictors = dict.fromkeys(paths)
        self.settings = settings
        self.base = None

    def get(self, path):
        """Return the `Predictor` of a run. Raises as `load_predictor`, KeyError for another path."""
        if self.predictors[path] is None:
            predictor = load_predictor(path, base=self.base, **self.settings)
            self.base = self.base or predictor.model
            self.predictors[path] = predictor
        return self.predictors[path]


def foreground_probability(predictor, image, prompt):
    """Return the probability of the foreground, float32 `[H, W]`, of an image uint8 `[H, W, 3]`."""
    logits = predictor.logits(to_batch([image], predictor.size), [prompt])[0]
    return logits_at_size(logits, image.shape[:2]).sigmoid().cpu().numpy()


def segment(runs, path, image, prompt, threshold):
    """Return the page's outputs: image with the mask, probability in grey, a line about it, mask."""
    if image is None or not prompt.strip():
        return None, None, "Choose an image and type what to segment.", None
    predictor = runs.get(path)
    probability = foreground_probability(predictor, image, prompt)
    mask = probability >= threshold
    tinted = Image.fromarray(overlay(image, mask, PREDICTION))
    grey = Image.fromarray((255 * probability).round().astype(np.uint8))
    share = f"{100 * mask.mean():.1f} % of the image; highest probability {probability.max():.3f}"
    notice = prompt_notice(predictor.metadata, [prompt])
    if notice:
        share = f"{share}. {notice}"
    return tinted, grey, share, mask_image(mask)


def run_examples(predictor):
    """Return [(image uint8 `[H, W, 3]`, prompt)] of the run's test split; none if its data are missing."""
    try:
        data, prompts = open_run_split(predictor.metadata, cache_dir=default_cache())
        return [(read_image(r.image), prompt) for r, prompt in zip(data.records[:EXAMPLES], prompts)]
    except (OSError, ValueError):
        return []


def import_gradio():
    """Return the module gradio. Raises ValueError if it is not installed."""
    try:
        import gradio
    except ImportError:
        raise ValueError("The page needs the package gradio: pip install gradio.") from None
    return gradio


def build_page(gradio, runs, examples=()):
    """Return the gradio page of some `Runs`, with two prompts side by side.

    examples: (image uint8 `[H, W, 3]`, prompt) to choose from.
    """
    paths = list(runs.predictors)
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.Markdown(f"## {TITLE}\nDrop an image, type a prompt. Not a medical device.")
        with gradio.Row():
            run = gradio.Dropdown(paths, value=paths[0], label="run")
            threshold = gradio.Slider(0.01, 0.99, 0.5, step=0.01, label="threshold of the probability")
        sources = ["upload", "clipboard"]
        image = gradio.Image(type="numpy", image_mode="RGB", sources=sources, label="image", height=260)
        prompts = []
        with gradio.Row():
            for title in ("prompt", "another prompt beside it"):
                with gradio.Column():
                    prompt = gradio.Textbox(label=title, max_length=1000)
                    tinted = _output_image(gradio, "mask on the image")
                    grey = _output_image(gradio, "probability")
                    mask = _output_image(gradio, "mask, to save")
                    share = gradio.Textbox(label="foreground", interactive=False)
                events = [prompt.submit, image.change, threshold.release, run.change]
                inputs = [run, image, prompt, threshold]
                gradio.on(events, partial(segment, runs), inputs, [tinted, grey, share, mask])
                prompts.append(prompt)
        if examples:
            images = [pixels for pixels, _ in examples]
            gallery = gradio.Gallery(
                images, label="of the test split", columns=8, height=180, allow_preview=False
            )

            def choose(event: gradio.SelectData):
                return examples[event.index]

            gallery.select(choose, None, [image, prompts[0]])
    return page


def _output_image(gradio, label):
    buttons = ["download", "fullscreen"]
    return gradio.Image(label=label, format="png", interactive=False, height=260, buttons=buttons)


def main(argv=None):
    parser = Parser(__doc__, EXAMPLE, prog="python -m vlsm.tools.serve")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or checkpoints to choose from")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s, this machine)")
    parser.add_argument("--port", type=number(int, 0, 65535), default=7860, help="default: %(default)s")
    parser.add_argument("--weights", help="folder or hub id of the base, if it has moved")
    parser.add_argument("--device", default="auto", help="auto (default: cuda if available), cpu, cuda:1")
    args = parser.parse_args(argv)
    gradio = import_gradio()  # before the weights are loaded
    runs = Runs(args.runs, weights=args.weights, device=args.device)
    examples = run_examples(runs.get(args.runs[0]))
    page = build_page(gradio, runs, examples)
    page.queue(max_size=16, default_concurrency_limit=1)
    say(f"Serving on http://{args.host}:{args.port}; Ctrl-C ends it.")
    page.launch(
        server_name=args.host, server_port=args.port or None, share=False, quiet=True, show_error=True,
        max_file_size=LARGEST_UPLOAD,
    )  # fmt: skip


if __name__ == "__main__":
    with friendly_errors():
        main()
