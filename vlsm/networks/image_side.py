"""The side of the square images that a network takes."""

from vlsm.system.files import field, read_json

DEFAULT_SIDE = 352  # pixels; CLIPSeg's, where the weights come without a preprocessor_config.json


def image_side(config, folder, requested=None):
    """Return the side in pixels: as requested, else the network's own, else its image processor's.

    config: the network's; folder: of the weights. Raises ValueError for a side that is no multiple of the
    network's stride, and for a processor file with a side out of range.
    """
    side = requested or getattr(config, "img_size", None)
    if side is None:
        side = _processor_side(folder / "preprocessor_config.json")
    stride = config.stride
    if side % stride:
        fitting = round(side / stride) * stride or stride
        raise ValueError(
            f"--image-size {side} is no multiple of the model's patch size {stride}; try {fitting}."
        )
    return side


def _processor_side(file):
    """Return the side that a Hugging Face image processor resizes to: `size`, a number or a dictionary."""
    if not file.is_file():
        return DEFAULT_SIDE
    settings = read_json(file)
    size = settings.get("size", DEFAULT_SIDE)
    if isinstance(size, dict):
        key = "shortest_edge" if "shortest_edge" in size and "height" not in size else "height"
        side = field(file, size, key, kind=int, words="a side in pixels")
    else:
        side = field(file, dict(settings, size=size), "size", kind=int, words="a side in pixels")
    if not 1 <= side <= 8192:
        raise ValueError(f"'{file}': a side of {side} pixels is out of range (1 to 8192).")
    return side
