"""Mutations of valid files: of bytes, of what a format consists of (chunks, members, headers), of JSON and text."""

import copy
import gzip
import io
import json
import struct
import zipfile
import zlib

EXTREMES = (
    0,
    1,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x7FFFFFFFFFFFFFFF,
    2**64 - 1,
)
VALUES = (
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "1", "../x",
    "/etc/passwd", "..\\x", "a/b", "é\ud800", "\x00", "\x1b[2J", "x" * 5000, [], [[]], {}, {"x": []}, [1, 2], [None],
)  # fmt: skip
WORDS = (
    "", "-1", "0", "1", "1.5", "nan", "inf", "1e400", "99999999999999999999", "x", "../x", "é", "\x1b]0;x\x07", "{}",
    "[", "(a", "(a|a)*$", "p1", "class", "random", "all", "none", "set", "runs/seed1", "runs", "mini", "--", "-", "--out",
    "--resume", "--overwrite", "--help", "--version", "--x", "x" * 300, "=", "--lr=", "1/2", "0/0", "auto", "cpu", "cuda:9",
)  # fmt: skip


def mutate(name, data, rng):
    """Return a mutated copy of a file's bytes; by its name, half of the time as what the format consists of."""
    by_format = {
        ".png": png, ".zip": archive, ".pt": archive, ".gz": packed, ".safetensors": tensors, ".json": structure,
        ".csv": table, ".txt": table, ".yaml": table, ".mhd": table, ".tif": directory, ".nii": directory,
    }  # fmt: skip
    change = by_format.get(name[name.rfind(".") :].lower())
    if change and rng.random() < 0.7:
        try:
            return change(data, rng)
        except (ValueError, LookupError, ArithmeticError, struct.error, zipfile.BadZipFile, zlib.error):
            pass  # what is mutated is no such file
    return noise(data, rng)


# Bytes


def noise(data, rng):
    """Return bytes of which some changed: bits, whole bytes, pieces or numbers."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not data:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
        # headers are read more than pixels are
        limit = rng.choice((len(data), min(len(data), 64), min(len(data), 512)))
        at = rng.randrange(limit)
        change = rng.randrange(8)
        if change == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at] = rng.choice((0, 255, rng.randrange(256)))
        elif change == 2:
            del data[at : at + rng.choice((1, 2, 4, 16, 256))]
        elif change == 3:
            del data[at:]
        elif change == 4:
            piece = data[at : at + rng.choice((1, 4, 16, 256))]
            data[at:at] = piece * rng.choice((1, 2, 50))
        elif change == 5:
            other, size = rng.randrange(len(data)), rng.choice((1, 4, 16))
            data[at : at + size], data[other : other + size] = (
                data[other : other + size],
                data[at : at + size],
            )
        else:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(EXTREMES) & (256**size - 1)
            data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(data)


def rearrange(items, k, change, rng):
    """Take the k-th of some items away (change 0), double it (1), or swap it with another (2)."""
    if change == 0:
        del items[k]
    elif change == 1:
        items.insert(k, items[k])
    else:
        other = rng.randrange(len(items))
        items[k], items[other] = items[other], items[k]


def png(data, rng):
    """Return a PNG whose chunks were changed, cut, doubled or swapped; their checksums are right."""
    chunks = []
    at = 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    k = rng.randrange(len(chunks))
    change = rng.randrange(8)
    if change < 3:
        rearrange(chunks, k, change, rng)
    elif change == 3:  # the compressed pixels
        pixels = b"".join(content for kind, content in chunks if kind == b"IDAT")
        pixels = zlib.compress(noise(zlib.decompress(pixels), rng))
        chunks = [(kind, pixels if kind == b"IDAT" else content) for kind, content in chunks]
    else:
        kind, content = chunks[0 if change > 5 else k]
        chunks[0 if change > 5 else k] = kind, noise(content, rng)
    parts = [data[:8]]
    for kind, content in chunks:
        checksum = zlib.crc32(kind + content)
        parts += [struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)]
    return b"".join(parts)


def directory(data, rng):
    """Return a file in whose numbers of two or four bytes some became extreme ones: TIFF's tags, NIfTI's header."""
    data = bytearray(data)
    start = 0
    end = min(len(data), 400)
    if data[:2] in (b"II", b"MM"):
        order = "little" if data[:2] == b"II" else "big"
        start = int.from_bytes(data[4:8], order)
        end = min(len(data), start + 250)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(start, end) & ~1
        size = rng.choice((2, 4))
        number = rng.choice((*EXTREMES, 2, 3, 4, 8, 16, 32)) & (256**size - 1)
        data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(data)


def packed(data, rng):
    return gzip.compress(mutate("x.nii", gzip.decompress(data), rng), 1)


def archive(data, rng):
    """Return a zip archive of which a member, its name or the list of members was changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        stored = file.infolist()[0].compress_type
        members = [(entry.filename, file.read(entry)) for entry in file.infolist()]
    k = rng.randrange(len(members))
    name, content = members[k]
    change = rng.randrange(8)
    if change == 0:
        del members[k]
    elif change == 1:
        members.append(members[k])
    elif change == 2:
        beginning = rng.choice(("../", "/", "C:\\", "a/../../", "x" * 300 + "/", "\x1b", ".", "é/", "\n"))
        members[k] = beginning + name, content
    elif change == 3:
        members[k] = name, members[rng.randrange(len(members))][1]
    else:
        members[k] = name, mutate(name, content, rng)
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w", stored) as file:
        for name, content in members:
            file.writestr(name, content)
    return new.getvalue()


def tensors(data, rng):
    """Return a file of safetensors whose header was changed; its length is right."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" in header and rng.random() < 0.6:
        texts = header["__metadata__"]
        key = rng.choice(sorted(texts))
        if rng.random() < 0.3:
            del texts[key]
        else:
            texts[key] = structure(texts[key].encode(), rng).decode("latin-1")
    else:
        header = change_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# JSON and text


def structure(data, rng):
    """Return JSON in which a value, a key or an item was exchanged, taken away or doubled."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        value = change_value(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.02:
        text = "[" * 100_000 + text
    return text.encode()


def change_value(value, rng):
    """Return a changed copy of a value that came from JSON."""
    places = [(None, None)]
    waiting = [value]
    while waiting:
        parent = waiting.pop()
        if isinstance(parent, (dict, list)):
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            for key in keys:
                places.append((parent, key))
                waiting.append(parent[key])
    parent, key = rng.choice(places)
    new = copy.deepcopy(rng.choice(VALUES))  # a case must not change those of later ones
    if parent is None:
        return new if rng.random() < 0.3 else value
    change = rng.randrange(6)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[rng.choice(("", "x", "../x", "0", "é", "x" * 300, str(key).upper()))] = parent.pop(key)
    elif change == 1:
        parent.append(parent[key])
    elif change == 2 and isinstance(parent[key], (int, float)):
        parent[key] = rng.choice((-parent[key], parent[key] * 10**9, parent[key] + 0.5, str(parent[key])))
    elif change == 3:
        parent[key] = [parent[key]]
    else:
        parent[key] = new
    return value


def table(data, rng):
    """Return a text in which a line or a word was exchanged, taken away or doubled."""
    lines = data.decode("latin-1").splitlines(keepends=True)
    k = rng.randrange(len(lines))
    change = rng.randrange(6)
    if change == 0:
        del lines[k]
    elif change == 1:
        lines.insert(k, lines[rng.randrange(len(lines))])
    elif change == 2:
        lines[k] = noise(lines[k].encode("latin-1"), rng).decode("latin-1")
    else:
        separator = "," if lines[k].count(",") > lines[k].count(" ") else " "
        words = lines[k].split(separator)
        words[rng.randrange(len(words))] = rng.choice((*WORDS, "0.5", "-", "\t", "nan", "1e9", '"'))
        lines[k] = separator.join(words)
    return "".join(lines).encode("utf-8", "replace")


def change_words(words, rng):
    """Return a command line [program, *words] in which words were exchanged, taken away, doubled or swapped."""
    program, *words = words
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not words:
            break
        k = rng.randrange(len(words))
        change = rng.randrange(6)
        if change < 3:
            rearrange(words, k, change, rng)
        elif change == 3:
            words.insert(k, rng.choice(WORDS))
        else:
            words[k] = rng.choice(WORDS)
    return [program, *words]
