"""Who may promote: Ed25519 keys, the private one with the promoter alone, the public one with everybody.

openssl genpkey -algorithm ed25519 -out promoter.pem && chmod 600 promoter.pem
openssl pkey -in promoter.pem -pubout -out promoters.pem
"""

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from workers.errors import ConfigError

RAW_BYTES = 32
PEM = re.compile(rb"-----BEGIN [^-]+-----.*?-----END [^-]+-----", re.DOTALL)


@dataclass(frozen=True)
class Keys:
    """Of a site; without any nothing is signed and no signature asked for."""

    private: Ed25519PrivateKey | None = None
    public: tuple[Ed25519PublicKey, ...] = ()
    """Each of them is believed."""

    @classmethod
    def load(cls, private: Path | None, public: Path | None) -> Self:
        """From files in PEM, the public one with any number of keys, or of 32 raw bytes. ConfigError names a
        file that is none, and a private key whose signatures nobody would believe."""
        signer = _read_private(private) if private else None
        believed = _read_public(public) if public else ()
        if signer is not None:
            own = _raw(signer.public_key())
            if public is None:
                believed = (signer.public_key(),)
            elif own not in map(_raw, believed):
                raise ConfigError(f"{public} lacks the public key of {private}: no reader would believe it")
        return cls(signer, believed)

    def sign(self, message: bytes) -> str:
        """Empty where nothing is signed. ConfigError without the private key that the others ask for."""
        if self.private is not None:
            return base64.b64encode(self.private.sign(message)).decode()
        if self.public:
            raise ConfigError(
                "promotions are signed here, and this site file names no private key: only who has it may "
                "promote, with `promotion_key_file` in a site file of their own"
            )
        return ""

    def verify(self, message: bytes, signature: str) -> bool:
        for key in self.public:
            try:
                key.verify(base64.b64decode(signature, validate=True), message)
            except (InvalidSignature, binascii.Error, ValueError):
                continue
            return True
        return False


def _read_private(path: Path) -> Ed25519PrivateKey:
    data = _bytes(path)
    if len(data) == RAW_BYTES:
        return Ed25519PrivateKey.from_private_bytes(data)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # What the parser says is not repeated: it may quote the file.
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"{path} holds no Ed25519 private key without a password; `openssl genpkey -algorithm ed25519` "
            "makes one"
        )
    return key


def _read_public(path: Path) -> tuple[Ed25519PublicKey, ...]:
    data = _bytes(path)
    if len(data) == RAW_BYTES:
        return (Ed25519PublicKey.from_public_bytes(data),)
    found = []
    for block in PEM.findall(data):
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{path}: one of its blocks is no Ed25519 public key (`openssl pkey -pubout`)")
        found.append(key)
    if not found:
        raise ConfigError(f"{path} holds no public key in PEM; `openssl pkey -pubout` writes one")
    return tuple(found)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)
