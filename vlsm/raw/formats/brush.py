"""Label Studio's run lengths of brush masks."""

import io

import numpy as np

DIGIT = ord("0")


def decode_brush(numbers, size):
    """Return the mask bool `[H, W]` of run lengths: bytes, as a list of numbers.

    A stream of bits: the count of values (32), the bits of a value - 1 (5), four bit sizes - 1 (4 each); then
    blocks: is one value repeated? (1), which bit size (2), length - 1 (of that size), one or all values. They
    are RGBA. Raises ValueError unless they fill the image.
    """
    height, width = size
    values = np.zeros(4 * height * width, np.uint8)
    bits = np.unpackbits(np.frombuffer(bytes(list(numbers)), np.uint8))
    try:
        _fill(values, io.BytesIO(bits + DIGIT))
    except ValueError:
        raise ValueError(f"run lengths that do not fill {width} x {height} pixels") from None
    alpha = values[3::4].reshape(size)
    return alpha > alpha.max() / 2  # 255 or 1, or the opacity of the brush


def _fill(values, stream):
    """Fill an array from a stream of digits, which int() reads faster than NumPy adds up so few bits."""
    count = _number(stream, 32)
    if count != len(values) or stream.read(5) != b"00111":  # eight bits a value
        raise ValueError
    bit_sizes = [_number(stream, 4) + 1 for _ in range(4)]
    start = 0
    while start < len(values):
        repeated = stream.read(1) == b"1"
        bit_size = bit_sizes[_number(stream, 2)]
        end = start + _number(stream, bit_size) + 1
        if repeated or end - start == 1:
            values[start:end] = _number(stream, 8)
        else:
            digits = np.frombuffer(stream.read(8 * (end - start)), np.uint8)
            values[start:end] = np.packbits(digits - DIGIT)
        start = end


def _number(stream, bits):
    """Read a number of so many digits. Raises ValueError at the stream's end."""
    return int(stream.read(bits), 2)
