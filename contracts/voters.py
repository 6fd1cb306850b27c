"""How a voter is known inside Tally: a keyed hash at the door, so that no store and no event holds a voter's id."""

from hashlib import blake2b
from uuid import UUID

from contracts.refusals import invalid_request
from contracts.text import voter_id_problem

KEY_BYTES = 16
# Keeps voter keys apart from other hashes that are made with the same secret.
PERSON = b"tally voter"
# What is kept of an idempotency key: few bytes, because each guess needs a call.
IDEMPOTENCY_PERSON = b"tally vote key"
IDEMPOTENCY_BYTES = 7


class VoterKeys:
    """Turns voter ids into voter keys and votes into receipt ids, with a secret of the command and query servers.

    Keyed BLAKE2b (RFC 7693) is a MAC like HMAC, and costs a quarter of HMAC-SHA256 here: docs/adr/0001.
    """

    def __init__(self, secret: str) -> None:
        self.secret = secret.encode()[:64]
        self._voters = blake2b(digest_size=KEY_BYTES, key=self.secret, person=PERSON)
        self._idempotency = blake2b(digest_size=KEY_BYTES, key=self.secret, person=IDEMPOTENCY_PERSON)
        self._receipts = blake2b(digest_size=KEY_BYTES, key=self.secret, person=b"tally receipt")

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that tell this secret from another one, and nothing else of it."""
        return blake2b(digest_size=KEY_BYTES, key=self.secret, person=b"tally secret").digest()

    def voter_key(self, voter_id: str, field: str = "voter_id") -> bytes:
        """The 16 bytes that stand for this voter in every poll. Raises INVALID_REQUEST for the field where it holds no
        voter id (contracts/text.py): only what every caller would write the same becomes a key."""
        if problem := voter_id_problem(voter_id):
            raise invalid_request({field: problem})
        digest = self._voters.copy()
        digest.update(voter_id.encode())
        return digest.digest()

    def idempotency_hash(self, voter_key: bytes, idempotency_key: str) -> bytes:
        """The 7 bytes that a vote keeps of the secret it was cast with: different for each voter."""
        digest = self._idempotency.copy()
        digest.update(voter_key + idempotency_key.encode())
        return digest.digest()[:IDEMPOTENCY_BYTES]

    def receipt_id(self, poll_id: UUID, voter_key: bytes) -> str:
        """The receipt of this voter in this poll: the same at every call, and meaningless without the secret."""
        digest = self._receipts.copy()
        digest.update(poll_id.bytes + voter_key)
        return digest.hexdigest()
