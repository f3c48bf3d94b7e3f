"""Open the key that a locked manager has on its disk, as `docker swarm unlock` does in the engine's memory.

The engine cannot make a new cluster of a manager that is locked at rest: it forgets the unlock key on the way
(https://github.com/moby/moby/issues/36852). With its key opened it can, and locks it again by itself.

The file is that of SwarmKit (ca/keyreadwriter.go, manager/deks.go): a PKCS#8 key, encrypted with the unlock key, in
PEM; in its headers the keys of the raft log, each a protobuf record of {1: algorithm, 2: data, 3: nonce}.

No sentence that comes out of here quotes a key.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable

from ansible.errors import AnsibleFilterError
from cryptography.hazmat.primitives import serialization

try:
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox
except ImportError:  # the role's other tasks work without it
    _HAS_NACL = False
else:
    _HAS_NACL = True

_UNLOCK_KEY = re.compile(r"SWMKEY-1-([A-Za-z0-9+/]{43})")
_PEM = re.compile(
    r"-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
    r"(?P<headers>(?:[^\n:]+: [^\n]*\n)*)\n?"
    r"(?P<body>[A-Za-z0-9+/=\n]+)"
    r"-----END ENCRYPTED PRIVATE KEY-----\n?"
)
# {1: 1 (NaCl secretbox), 2: 32 bytes and their seal of 16, 3: 24 bytes}, and {2: 32 bytes} when it is not encrypted.
_SEALED = re.compile(rb"\x08\x01\x12\x30(?P<data>.{48})\x1a\x18(?P<nonce>.{24})", re.DOTALL)
_PLAIN = b"\x12\x20"
_RAFT_KEYS = ("raft-dek", "raft-dek-pending")
# Of the unlock key that it was encrypted with: the swarm's own is newer, so the engine locks it with that.
_VERSION = "kek-version"


def _opened_raft_key(value: str, unlock_key: bytes) -> str:
    if not _HAS_NACL:
        raise AnsibleFilterError("PyNaCl is missing beside Ansible: install what requirements-ansible.txt names.")
    sealed = _SEALED.fullmatch(base64.b64decode(value))
    if sealed is None:
        raise AnsibleFilterError("a key of the raft log is in a form that is not known here (with FIPS?).")
    try:
        key = SecretBox(unlock_key).decrypt(sealed["data"], sealed["nonce"])
    except CryptoError as error:
        raise AnsibleFilterError("the unlock key does not open the keys of the raft log.") from error
    return base64.b64encode(_PLAIN + key).decode()


def swarm_key_opened(pem: str, unlock_key: str) -> str:
    """Return the text of swarm-node.key without its encryption; one that has none is returned as it is.

    Args:
        pem: what is in /var/lib/docker/swarm/certificates/swarm-node.key.
        unlock_key: what `docker swarm unlock-key` prints: SWMKEY-1- and 43 characters.

    Raises:
        AnsibleFilterError: with one sentence, when the file or the unlock key is not of that form, or one does not
            open the other.

    """
    if "ENCRYPTED" not in pem:
        return pem
    file, secret = _PEM.fullmatch(pem), _UNLOCK_KEY.fullmatch(unlock_key.strip())
    if file is None:
        raise AnsibleFilterError("swarm-node.key is in a form that is not known here.")
    if secret is None:
        raise AnsibleFilterError("it is locked at rest, and no unlock key was given (SWMKEY-1- and 43 characters).")
    password = base64.b64decode(secret[1] + "=")
    try:
        key = serialization.load_der_private_key(base64.b64decode(file["body"]), password)
    except (ValueError, binascii.Error) as error:
        raise AnsibleFilterError("the unlock key does not open swarm-node.key.") from error
    headers = dict(line.split(": ", 1) for line in file["headers"].splitlines())
    for name in _RAFT_KEYS:
        if name in headers:
            headers[name] = _opened_raft_key(headers[name], password)
    headers[_VERSION] = "0"
    body = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    begin, rest = body.split("\n", 1)
    return "\n".join([begin, *(f"{name}: {value}" for name, value in headers.items()), "", rest])


def swarm_key_problem(pem: str, unlock_key: str) -> str:
    """Return why `swarm_key_opened` would not open a key, in one sentence; "" when it would."""
    try:
        swarm_key_opened(pem, unlock_key)
    except AnsibleFilterError as error:
        return str(error)
    return ""


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"swarm_key_opened": swarm_key_opened, "swarm_key_problem": swarm_key_problem}
