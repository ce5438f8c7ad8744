"""Bytes that are no longer what they were: for configs, results files, pictures and tables."""

import random

TOKENS = b"""null true .nan -.inf 1e999 1e400 -1 0 '' [] {} [[[[ {{ *a <<: ... # --- " '
    NaN Infinity <script> ../../x 12345678901234567890 0x1F 1_000 12:30:45 2001-99-99""".split()
TOKENS += [b"9" * 5000, b"&a [*a]", b"? [a]\n: b", b"%YAML 9.9", b"---\n", b": ", b"- ", b"<<: [1]"]
TOKENS += [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\t", b"\n"]
TOKENS += [b"!!python/object/apply:os.system ['touch /tmp/pwned']", b"!!set {a}", b"!!omap [1]"]
TOKENS += [b"!!binary x", b"!!int ''", b"!!bool x", b"!!timestamp x", b"!!float x"]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """`data` with one to four of: a bit turned over, a piece cut out, doubled, moved, or replaced
    by a token.
    """
    for _ in range(dice.randint(1, 4)):
        data = changed(data, dice, dice.choice("flip cut end double move token token".split()))
    return data


def changed(data: bytes, dice: random.Random, how: str) -> bytes:
    """One of the changes of `mutated`, somewhere."""
    at = dice.randrange(len(data) + 1)
    length = dice.choice([0, 1, 2, 5, 20, 200])
    piece = data[at : at + length]
    rest = data[at + length :]
    if how == "flip":
        flipped = bytearray(data)
        if at < len(data):
            flipped[at] ^= 1 << dice.randrange(8)
        return bytes(flipped)
    if how == "move":
        data = data[:at] + rest
        at = dice.randrange(len(data) + 1)
        return data[:at] + piece + data[at:]
    middle = {"cut": b"", "double": piece * 3, "token": dice.choice(TOKENS)}
    return data[:at] if how == "end" else data[:at] + middle[how] + rest
