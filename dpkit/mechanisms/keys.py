"""Keys: where the randomness of a run comes from, and why no draw is ever made twice.

Guarantees:
  * A run has 256 secret bits from the operating system. They are never written anywhere; resuming takes new ones.
  * Each stream of random numbers has its own key, expanded by SHAKE-256 from the run's secret and the full label of the
    stream (purpose, step, query, parameter, shard). Sampling and noise have different purposes and share nothing.
  * A noise key exists only in exchange for a ledger receipt, which is consumed: no charge, no noise; one charge,
    one key.
  * On CPU the whole 19,968-bit state of the generator is filled from the key. ``manual_seed`` would keep 32 bits of it.
  * A process that was forked from the one that trains can draw from none of these streams, nor can a worker of a
    DataLoader; no key can be pickled or copied.

Requires: an operating system whose random numbers nobody can predict, and memory that no stranger reads.
Why: without the secret, SHAKE-256 of it and of a label is not told from random bits, and different labels are different
strings (each is preceded by its length); releases are counted in the process, so that no label comes twice.

Batches, and the noise of ``Gaussian`` and ``Correlated``, come from PyTorch's generators (Mersenne twister on CPU,
Philox with a 64-bit key on CUDA): good statistical generators and not cryptographic ones.  Who sees enough of a
Mersenne twister's output can tell the rest.  The noise of a known sum is such output, which is why :meth:`cipher_key`
feeds ChaCha20 in the other tiers; who was drawn into a batch is not, for nobody sees it, and the generator of the next
batch has a state of its own that only the secret leads to.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass, field

import numpy as np
import torch

from accounting import Receipt
from dpkit.errors import InvalidArgument, OutOfOrder

_SECRET_BYTES = 32
_TWISTER_WORDS = 624
_TWISTER_HEADER = 24  # bytes: the initial seed (8), words left (4), seeded flag (4), next word (8)


def _expand(secret: bytes, purpose: str, *labels: str | int) -> bytes:
    """32 bytes that depend on every bit of ``secret`` and on the exact sequence of labels."""
    digest = hashlib.shake_256(secret)
    for label in (purpose, *labels):
        encoded = f"{type(label).__name__}:{label}".encode()
        # Length first: without it ("ab", "c") and ("a", "bc") would be one stream.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest(_SECRET_BYTES)


def generator_from(key: bytes, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose whole state is set by ``key``.

    Args:
      key: 32 bytes; all of them matter on CPU, 64 bits expanded from all of them on CUDA.
      device: where the numbers will be drawn.
    """
    device = torch.device(device)
    if device.type != "cpu":
        seed = int.from_bytes(hashlib.shake_256(key + b"philox").digest(8), "little", signed=True)
        return torch.Generator(device).manual_seed(seed)
    generator = torch.Generator()
    state = generator.get_state().numpy().copy()
    words = np.frombuffer(hashlib.shake_256(key + b"twister").digest(4 * _TWISTER_WORDS), dtype="<u4")
    state[:] = 0
    state[8] = 1  # one word left: the next draw first regenerates the whole block from the state below
    state[12] = 1  # seeded
    state[_TWISTER_HEADER : _TWISTER_HEADER + 8 * _TWISTER_WORDS] = words.astype("<u8").view(np.uint8)
    generator.set_state(torch.from_numpy(state))
    return generator


@dataclass(frozen=True)
class NoiseKey:
    """The key of one release. Made by :meth:`RunKey.noise_key` only, and good in the process that made it.

    For guarantee, requirements and proof see the module.
    """

    _key: bytes = field(repr=False)
    _pid: int = field(default_factory=os.getpid, repr=False, compare=False)

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a NoiseKey is never copied or stored: whoever has it can take the noise away")

    def generator(self, query: int, name: str, shard: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
        """The torch generator of one tensor of the release."""
        refuse_other_process(self._pid)
        return generator_from(_expand(self._key, "tensor", query, name, shard), device)

    def cipher_key(self, query: int, name: str, shard: int = 0) -> bytes:
        """32 bytes for the stream cipher of one tensor of the release; they tell nothing of :meth:`generator`'s."""
        refuse_other_process(self._pid)
        return _expand(self._key, "cipher", query, name, shard)


class RunKey:
    """The secret of one run, used by one process. For guarantee, requirements and proof see the module.

    Args:
      seed: None takes 256 bits from the operating system. A number makes noise and sampling reproducible for research
        and debugging: anybody who knows it can remove the noise, and two runs with one seed share theirs, so such a run
        is never certified.
    Raises:
      InvalidArgument: when the seed is not an integer.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is None:
            self._secret = os.urandom(_SECRET_BYTES)
        elif isinstance(seed, int) and not isinstance(seed, bool):
            self._secret = hashlib.sha256(b"dpkit seeded run, not certified" + str(seed).encode()).digest()
        else:
            raise InvalidArgument(f"seed is {seed!r}; give an integer, or None for noise that nobody can repeat.")
        self.certified = seed is None
        self._claimed = False
        self._pid = os.getpid()
        self._plan_id: str | None = None
        self._releases = 0

    def __repr__(self) -> str:
        return f"RunKey(certified={self.certified})"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a RunKey is never copied or stored: two runs with one key share their noise")

    def claim(self, *, resumed_at: str | None = None) -> None:
        """Bind the key to the one run that uses it.

        Args:
          resumed_at: digest of the ledger's last entry when the run is resumed: a seeded run has other keys from then
            on, or its next steps would repeat the noise of its first ones.
        Raises:
          OutOfOrder: it has been claimed, or was made in another process.
        """
        self._refuse_other_process()
        if self._claimed:
            raise OutOfOrder("this engine's key is in use by another engine: make a new PrivacyEngine for every run.")
        self._claimed = True
        if resumed_at is not None:
            self._secret = _expand(self._secret, "resumed", resumed_at)

    def sampling(self, draw: int) -> torch.Generator:
        """The CPU generator that selects the units of the ``draw``-th batch of this run."""
        self._refuse_other_process()
        return generator_from(_expand(self._secret, "sampling", draw))

    def seed_global_generators(self) -> None:
        """Give the generators that dropout and augmentations draw from a state that nobody knows: torch's own, Python's
        and numpy's global ones, and through torch's those of a loader's workers.

        What they draw for one unit depends on how many others came before it. Whoever knew their state would see a
        unit's absence in what all others were masked with, beyond what the noise covers.
        """
        self._refuse_other_process()
        torch.set_rng_state(generator_from(_expand(self._secret, "torch")).get_state())
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(int.from_bytes(_expand(self._secret, "torch", "cuda")[:8], "little") >> 1)
        random.seed(_expand(self._secret, "python"))
        np.random.seed(np.frombuffer(_expand(self._secret, "numpy"), dtype="<u4"))

    def arrangement(self) -> torch.Generator:
        """The CPU generator of what is drawn once for the whole run, such as the groups of the units."""
        self._refuse_other_process()
        return generator_from(_expand(self._secret, "arrangement"))

    def query_key(self, receipt: Receipt) -> NoiseKey:
        """The key of a release beside the run's plan, which has a plan of its own in the ledger.

        Raises:
          accounting.LedgerError: when the receipt was already used.
        """
        self._refuse_other_process()
        receipt.consume()
        self._releases += 1
        return NoiseKey(_expand(self._secret, "query", self._releases))

    def noise_key(self, receipt: Receipt) -> NoiseKey:
        """The key of the release that ``receipt`` has paid for.

        Raises:
          accounting.LedgerError: when the receipt was already used.
          OutOfOrder: when it is of another plan than the receipts before it.
        """
        self._refuse_other_process()
        if self._plan_id not in (None, receipt.plan_id):
            raise OutOfOrder("one run key serves one plan: the steps of two plans would share their noise.")
        self._plan_id = receipt.plan_id
        receipt.consume()
        # Counted here and not taken from the receipt: a ledger file that was put back to an earlier state would number
        # two steps alike, and their difference would be free of noise.
        self._releases += 1
        return NoiseKey(_expand(self._secret, "noise", self._releases))

    def _refuse_other_process(self) -> None:
        refuse_other_process(self._pid)


def refuse_other_process(pid: int) -> None:
    """Refuse to draw in another process than ``pid``: a forked child has the same secret, and so the same noise.

    Raises:
      OutOfOrder: this is another process.
    """
    if os.getpid() != pid:
        raise OutOfOrder("this engine was made in another process; make the engine in the process that trains.")
