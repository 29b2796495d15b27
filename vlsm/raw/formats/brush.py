"""Label Studio's run lengths of brush masks."""

import io

import numpy as np


def decode_brush(numbers, size):
    """Return the mask bool `[H, W]` of run lengths: bytes, as a list of numbers.

    A stream of bits: the count of values (32), the bits of a value - 1 (5), four bit sizes - 1 (4 each); then
    blocks: is one value repeated? (1), which bit size (2), length - 1 (of that size), one or all values. They
    are RGBA. Raises ValueError unless they fill the image.
    """
    height, width = size
    values = np.zeros(4 * height * width, np.uint8)
    digits = [f"{byte:08b}" for byte in bytes(list(numbers))]
    try:
        _fill(values, io.StringIO("".join(digits)))
    except ValueError:
        raise ValueError(f"run lengths that do not fill {width} x {height} pixels") from None
    alpha = values[3::4].reshape(size)
    return alpha > alpha.max() / 2  # 255 or 1, or the opacity of the brush


def _fill(values, stream):
    """Fill an array from a stream of digits, which int() reads faster than NumPy adds up so few bits."""
    count = _number(stream, 32)
    if count != len(values) or stream.read(5) != "00111":  # eight bits a value
        raise ValueError
    bit_sizes = [_number(stream, 4) + 1 for _ in range(4)]
    start = 0
    while start < len(values):
        repeated = stream.read(1) == "1"
        bit_size = bit_sizes[_number(stream, 2)]
        end = start + _number(stream, bit_size) + 1
        count = 1 if repeated else end - start
        values[start:end] = [_number(stream, 8) for _ in range(count)]
        start = end


def _number(stream, bits):
    """Read a number of so many digits. Raises ValueError at the stream's end."""
    return int(stream.read(bits), 2)
