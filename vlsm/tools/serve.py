"""Serve a page to try images and prompts on, by gradio (pip install gradio).

Uploads and results stay in the temporary folder for an hour, copies of the examples longer; the program
writes no other files.
"""

import re
import tempfile
from functools import partial
from html import escape
from pathlib import Path

import torch
from PIL import Image

from datasets import open_run_split
from vlsm.data.cache import default_cache
from vlsm.data.images import ImageError, mask_image, read_image, read_target
from vlsm.metrics import dsc
from vlsm.results.figures import TRUTH, outline, overlay, rgb
from vlsm.results.predict import load_predictors, logits_at_size, part_of_name
from vlsm.segment import logit_of, prompt_notice, to_batch
from vlsm.system.arguments import Parser, number
from vlsm.system.console import friendly_errors, say
from vlsm.system.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, YELLOW, styled

EXAMPLE = """examples:
  python -m vlsm.tools.serve runs/kvasir-dense-64-seed42
  python -m vlsm.tools.serve runs/kvasir-dense-64-seed42 runs/kvasir-coop-seed42 --device cpu
  python -m vlsm.tools.serve hub:owner/polyps --port 8000"""
EXAMPLES = 24  # images of the test split
COLOURS = (SKY, ORANGE, PURPLE, YELLOW, BLUE, VERMILION)  # of prompts; the truth is green
NEEDS = "Choose an image and type one to six prompts."
TITLE = "Segment an image by a prompt"


def own_page(app, name):
    """Wrap an ASGI app to refuse other sites' requests, and host names other than `name` and localhost.

    Another site may give its name this machine's address (DNS rebinding); an IP address cannot be forged so.
    """
    from starlette.responses import PlainTextResponse

    known = re.compile(rf"(localhost|{re.escape(name)}|[\d.]+|\[[\da-f:.]+\])(:\d+)?", re.I)

    async def guarded(scope, receive, send):
        headers = dict(scope.get("headers", ()))
        host = headers.get(b"host", b"")
        allowed = known.fullmatch(host.decode("latin-1")) or scope["type"] == "lifespan"
        if allowed and headers.get(b"origin", host).split(b"//")[-1] == host:
            return await app(scope, receive, send)
        await PlainTextResponse("Open this page by its IP address.", 403)(scope, receive, send)

    return guarded


def save(write, folder, *words):
    """Write a PNG file, named by words, in a new folder below `folder`; return its path.

    write: a function of the path, such as an image's `save`.
    """
    name = "_".join(map(part_of_name, words))
    name = name.encode()[:250].decode(errors="ignore")  # a file's name has at most 255 bytes
    path = f"{tempfile.mkdtemp(dir=folder)}/{name}.png"
    write(path)
    return path


def read_upload(path, name):
    """Read an uploaded image, uint8 `[H, W, 3]`; one of too many pixels is refused before they are decoded.

    Raises ImageError.
    """
    try:
        with Image.open(
            path, formats=["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000"]
        ) as image:
            width, height = image.size
    except Exception as error:  # Pillow's readers raise many types
        raise ImageError(
            name, "it is damaged, was deleted after an hour, or is no PNG, JPEG, TIFF, ... that is read"
        ) from error
    if width * height > 16e6:  # a small file may claim gigabytes
        raise ImageError(name, "it has more than 16 megapixels")
    return read_image(path, name)


def ask(predictors, folder, run, upload, text, example):
    """Return a run's answer to prompts on an image, as `show` takes it, and a file of the probabilities.

    upload: (path, name) of the image, or None. text: prompts, separated by semicolons or lines. example:
    (path, truth, its prompt) of the example chosen last, or None. If the user must act, the answer is a
    sentence.
    """
    # between the separators, without spaces around them, each once
    prompts = list(dict.fromkeys(re.findall(r"[^;\s](?:[^;\n]*[^;\s])?", text)))
    if upload is None or not 1 <= len(prompts) <= len(COLOURS):
        return NEEDS, None
    path, name = upload
    try:
        image = read_upload(path, name)
    except ImageError as error:
        return str(error), None
    truth, of_truth = example[1:] if example and example[0] == path else (None, "")
    predictor = predictors[run]
    logits = predictor.logits(to_batch([image], predictor.size), prompts).cpu()  # [P, 1, S, S]
    name = Path(name).stem
    answer = name, image, prompts, logits, truth, of_truth, prompt_notice(predictor.metadata, prompts)
    return answer, draw_probabilities(folder, name, prompts, logits, image.shape)


@styled()
def draw_probabilities(folder, name, prompts, logits, shape):
    """Draw the probabilities of all prompts side by side, with a scale; return the file's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(prompts), 3.4), layout="constrained")
    axes = figure.subplots(1, len(prompts), squeeze=False)[0]
    for axis, prompt, of_prompt in zip(axes, prompts, logits):
        drawn = axis.imshow(of_prompt[0].sigmoid(), vmin=0, vmax=1, aspect=shape[0] / shape[1])
        axis.set_title(prompt)
        axis.set_axis_off()
    figure.colorbar(drawn, ax=axes, label="probability")
    return save(figure.savefig, folder, name, "probability")


def show(folder, answer, threshold):
    """Return (path of the image with all masks, legend in HTML, paths of the masks) at a threshold.

    answer: a sentence; or name of the files, image uint8 `[H, W, 3]`, prompts, logits `[P, 1, S, S]`, truth
    uint8 `[H, W]` or None, its prompt, and a notice.
    """
    if isinstance(answer, str):
        return None, escape(answer), None
    name, image, prompts, logits, truth, of_truth, notice = answer
    step = 1 + max(image.shape) // 2000  # large images are shown smaller; their masks are saved in full
    result = image[::step, ::step]
    files = []
    legend = ""
    for prompt, of_prompt, colour in zip(prompts, logits, COLOURS):
        mask = logits_at_size(of_prompt, image.shape[:2]) > logit_of(threshold)
        files.append(save(mask_image(mask).save, folder, name, prompt, "mask"))
        result = overlay(result, mask[::step, ::step].numpy(), rgb(colour))
        legend += (
            f'<li style="--colour: {colour}">{escape(prompt)}: {100 * mask.float().mean():.1f} % of the image'
        )
        if truth is not None:
            legend += f", DSC {100 * dsc([mask], [truth]).item():.1f} %"
    if truth is not None:
        result[outline(truth[::step, ::step].numpy() == 1)] = TRUTH
        legend += f'<li style="--colour: {GREEN}">outline: the truth of “{escape(of_truth)}”, which DSC is of'
    file = save(Image.fromarray(result).save, folder, name, "overlay")
    return file, f"<ul>{legend}</ul>{escape(notice)}", files


def run_examples(predictor):
    """Return [(record, prompt)] of the run's test split; none if its data are missing."""
    try:
        data, prompts = open_run_split(predictor.metadata, cache_dir=default_cache())
        return list(zip(data.records[:EXAMPLES], prompts))
    except (OSError, ValueError):
        return []


def build_page(gradio, predictors, examples=()):
    """Return the gradio page of {name: predictor of a run}; examples: (record, prompt) to choose from."""
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        folder = page.GRADIO_CACHE
        gradio.Markdown(f"# {TITLE}\nNot a medical device.")
        with gradio.Row(elem_id="question"):
            run = gradio.Dropdown(list(predictors), label="run")
            prompt = gradio.Textbox(label="prompt, or several: a; b", placeholder="a polyp", max_length=1000)
            button = gradio.Button("Segment", variant="primary")
        with gradio.Row(elem_id="images"):
            image = gradio.Image(label="image", sources=["upload", "clipboard"], alt_text="image")
            result = gradio.Image(
                label="result", interactive=False, alt_text="image with masks", buttons=["download"]
            )
        threshold = gradio.Slider(0.01, 0.99, 0.5, step=0.01, label="threshold of the probability")
        legend = gradio.HTML(NEEDS, elem_id="legend")
        files = gradio.File(label="masks at this threshold", file_count="multiple", interactive=False)
        probability = gradio.Image(
            label="probability", interactive=False, alt_text="probability", buttons=["download"]
        )
        gallery = gradio.Gallery(
            [(read_image(record.image), text) for record, text in examples],
            label="examples of the test split", columns=8, allow_preview=False,
        )  # fmt: skip
        answer = gradio.State(NEEDS)
        example = gradio.State()
        # the file itself: gradio would convert it to 8 bits
        image.preprocess = lambda upload: upload and (upload.path, upload.orig_name or "image")

        def choose(event: gradio.SelectData):
            """Return an example's file, its prompt, and what `ask` takes as the example."""
            record, text = examples[event.index]
            file = save(Image.fromarray(read_image(record.image)).save, folder, Path(record.name).stem)
            return file, text, (file, torch.from_numpy(read_target(record.mask)), text)

        asking = dict(
            fn=partial(ask, predictors, folder), inputs=[run, image, prompt, example],
            outputs=[answer, probability], trigger_mode="always_last", api_visibility="private",
        )  # fmt: skip
        # the threshold is read after the network's pass, during which the slider may move
        showing = dict(
            fn=partial(show, folder), inputs=[answer, threshold], outputs=[result, legend, files],
            trigger_mode="always_last", api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        gradio.on([button.click, prompt.submit, image.input, run.input], **asking).then(**showing)
        threshold.change(**showing)
        choosing = gallery.select(choose, None, [image, prompt, example], api_visibility="private")
        choosing.then(**asking).then(**showing)
        # Screen readers announce results, and name examples by prompts; a choice shows the result above.
        page.load(
            js="""() => {
                document.querySelector("#legend").setAttribute("aria-live", "polite");
                document.querySelectorAll(".thumbnail-item").forEach((item) => {
                    item.ariaLabel = item.innerText;
                    item.addEventListener("click", () => scrollTo(0, 0));
                });
            }"""
        )
    return page


def main(argv=None):
    parser = Parser(__doc__, EXAMPLE, prog="python -m vlsm.tools.serve")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or checkpoints to choose from")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address (default: %(default)s, this machine; 0.0.0.0: all of its addresses). The page opens "
        "by IP address, localhost or this name; other names are refused",
    )
    parser.add_argument("--port", type=number(int, 0, 65535), default=7860, help="default: %(default)s")
    parser.add_argument("--weights", help="folder or hub id of the base, if it has moved")
    parser.add_argument("--device", default="auto", help="auto (default: cuda if available), cpu, cuda:1")
    args = parser.parse_args(argv)
    try:
        import gradio  # before the weights are loaded
        from starlette.middleware import Middleware
    except ImportError:
        raise ValueError("The page needs the package gradio: pip install --upgrade gradio.") from None
    predictors = load_predictors(args.runs, weights=args.weights, device=args.device)
    page = build_page(gradio, dict(zip(args.runs, predictors)), run_examples(predictors[0]))
    say(f"Serving on http://{args.host}:{args.port}; Ctrl-C ends it.")
    page.queue(max_size=64).launch(
        server_name=args.host, server_port=args.port or None, share=False, quiet=True, footer_links=[],
        max_file_size="20mb", state_session_capacity=32, css_paths=Path(__file__).with_suffix(".css"),
        app_kwargs=dict(middleware=[Middleware(own_page, args.host)]),
    )  # fmt: skip


if __name__ == "__main__":
    with friendly_errors():
        main()
