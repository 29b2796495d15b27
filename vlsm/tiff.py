"""The few TIFFs that Pillow refuses: uncompressed strips of 8 bits, by rows, one to four channels."""

import struct

import numpy as np

KINDS = {1: "B", 3: "H", 4: "I"}  # bytes, shorts and longs: all that is needed here
WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, CHANNELS, COUNTS, PLANAR = 256, 257, 258, 259, 273, 277, 279, 284


def _tags(data):
    """The first directory's tags: {number: list of integers}."""
    order = "<" if data[:2] == b"II" else ">"
    magic, at = struct.unpack_from(order + "HI", data, 2)
    if magic != 42:
        raise OSError("no TIFF of the usual kind")
    found = {}
    for i in range(struct.unpack_from(order + "H", data, at)[0]):
        tag, kind, count, value = struct.unpack_from(order + "HHI4s", data, at + 2 + 12 * i)
        if kind in KINDS:
            size = struct.calcsize(order + KINDS[kind]) * count
            raw = value[:size] if size <= 4 else data[struct.unpack(order + "I", value)[0] :][:size]
            found[tag] = list(struct.unpack(f"{order}{count}{KINDS[kind]}", raw))
    return found


def read_tiff(data):
    """uint8 `[H, W]` or `[H, W, C]` of a file's bytes. Raises OSError for what is not as above, or is cut off."""
    try:
        tags = _tags(data)
        (height,), (width,), channels = tags[HEIGHT], tags[WIDTH], tags.get(CHANNELS, [1])[0]
        plain = tags.get(COMPRESSION, [1]) == [1] and set(tags.get(BITS, [8])) == {8} and 1 <= channels <= 4
        strips = b"".join(data[at : at + n] for at, n in zip(tags[OFFSETS], tags[COUNTS]))
    except (KeyError, struct.error, ValueError) as error:
        raise OSError(f"truncated or damaged TIFF ({error})") from error
    if not plain:
        raise OSError("TIFF with compression, or other than 8 bits")
    if len(strips) < height * width * channels:
        raise OSError("truncated TIFF")
    values = np.frombuffer(strips, np.uint8)[: height * width * channels]
    if tags.get(PLANAR, [1]) == [2]:
        values = values.reshape(channels, height, width).transpose(1, 2, 0)
    else:
        values = values.reshape(height, width, channels)
    return values[..., 0] if channels == 1 else np.ascontiguousarray(values)
