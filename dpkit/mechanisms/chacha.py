"""ChaCha20 as a source of random words: who lacks the key cannot tell them from uniform bits.

Guarantee: the words of a key and a nonce are those of RFC 8439 (section 2.4: the key stream, from block 0 on), read as
64-bit little-endian numbers, the same on every device and however they are asked for.  On CPU OpenSSL makes them,
elsewhere 32-bit integer operations of torch do (section 2.3), and never anything else.  No word is given out twice, and
no stream is longer than its 32-bit block counter.
Requires: a key that no other stream with the same nonce has (``keys.py``).
Why: the text of RFC 8439, whose test vectors both ways of computing it reproduce.

Not promised: that the key is wiped from memory, or that drawing takes the same time whatever was drawn.

Source: Nir and Langley 2018, RFC 8439.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from dpkit.errors import InvalidArgument

from .keys import refuse_other_process

WORDS_PER_BLOCK = 8
MOST_WORDS = WORDS_PER_BLOCK * 2**32

_CONSTANTS = b"expand 32-byte k"
_DOUBLE_ROUNDS = 10
_LONGEST_CALL = 2**17  # words: more zeros to encrypt at a time would not fit into a processor's cache


class KeyStream:
    """The words of one key and nonce, from the first on.

    Args:
      key: 32 bytes that no other stream with this nonce has.
      nonce: which of the streams of the key.
      device: where the words will be.
    """

    def __init__(self, key: bytes, nonce: int = 0, device: torch.device | str = "cpu") -> None:
        self._key, self._nonce = key, nonce.to_bytes(12, "little")
        self._device = torch.device(device)
        self._pid = os.getpid()
        self._given = 0
        if self._device.type == "cpu":
            self._encryptor = Cipher(algorithms.ChaCha20(key, bytes(4) + self._nonce), mode=None).encryptor()

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a KeyStream is never copied or stored: whoever has it can take the noise away")

    def words(self, count: int) -> Tensor:
        """The next ``count`` words, (count,) int64: the bits matter, the sign does not.

        Raises:
          InvalidArgument: the stream would become longer than its block counter counts.
          OutOfOrder: the process is not the one in which the stream began.
        """
        refuse_other_process(self._pid)
        begin, end = self._given, self._given + count
        if end > MOST_WORDS:
            raise InvalidArgument(
                f"{end} random words were asked of one ChaCha20 stream, which has {MOST_WORDS}: cut the tensor into "
                "parameters of fewer numbers."
            )
        self._given = end
        if self._device.type == "cpu":
            return torch.from_numpy(self._encrypted_zeros(count))
        first = begin // WORDS_PER_BLOCK
        blocks = key_stream_in_torch(self._key, self._nonce, first, -(-end // WORDS_PER_BLOCK) - first, self._device)
        return blocks[begin - first * WORDS_PER_BLOCK :][:count]

    def _encrypted_zeros(self, count: int) -> np.ndarray:
        words = np.empty(count, dtype="<i8")
        for start in range(0, count, _LONGEST_CALL):
            part = words[start : start + _LONGEST_CALL]
            part[:] = np.frombuffer(self._encryptor.update(bytes(part.nbytes)), dtype="<i8")
        return words.astype(np.int64, copy=False)


def key_stream_in_torch(key: bytes, nonce: bytes, first: int, blocks: int, device: torch.device | str) -> Tensor:
    """The words of ``blocks`` blocks from number ``first`` on, (8·blocks,) int64, by integer operations of torch.

    Args:
      nonce: 12 bytes.
    """
    fixed = torch.from_numpy(np.frombuffer(_CONSTANTS + key, dtype="<i4").astype(np.int32)).to(device)
    after = torch.from_numpy(np.frombuffer(nonce, dtype="<i4").astype(np.int32)).to(device)
    counter = torch.arange(first, first + blocks, device=device)
    counter = torch.where(counter < 2**31, counter, counter - 2**32).to(torch.int32)
    # The 4 by 4 matrix of RFC 8439, each of whose 16 entries is one number per block.
    rows = [row[:, None].expand(4, blocks) for row in fixed.split(4)]
    rows.append(torch.cat([counter[None], after[:, None].expand(3, blocks)]))
    mixed = rows
    for _ in range(_DOUBLE_ROUNDS):
        mixed = _quarter_rounds(*mixed)
        # Diagonals are columns once row k is turned by k places.
        mixed = _quarter_rounds(*[row.roll(-place, 0) for place, row in enumerate(mixed)])
        mixed = [row.roll(place, 0) for place, row in enumerate(mixed)]
    state = torch.cat([row + other for row, other in zip(mixed, rows, strict=True)])
    halves = state.t().reshape(-1, 2).to(torch.int64)
    return (halves[:, 0] & 0xFFFFFFFF) | (halves[:, 1] << 32)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    """Section 2.1 on the four columns of all blocks at once; int32 addition is modulo 2^32."""
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return [a, b, c, d]


def _rotated(x: Tensor, places: int) -> Tensor:
    # The shift to the right brings copies of the sign in, which are masked out.
    return (x << places) | ((x >> (32 - places)) & ((1 << places) - 1))
