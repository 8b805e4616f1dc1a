"""The development issuer: sessions without passwords, which Keycloak would otherwise have to give.

`metering up` turns it on so that everything can be tried at once; settings refuse it in
production. Its sessions pass the same checks as all others, with the key that is kept in the data
directory.
"""

import os
from base64 import urlsafe_b64encode
from contextlib import suppress
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from jwt import PyJWK
from jwt.algorithms import RSAAlgorithm
from jwt.types import JWKDict

from api.callers import User
from api.keys import MIN_KEY_BITS, FixedKeys
from api.sessions import ACCESS_TOKEN, ALGORITHM, SYSTEM_ADMIN
from schema.errors import ConfigurationError
from schema.settings import Settings

log = structlog.get_logger(__name__)

KEY_FILE: Final = "dev-issuer.pem"
NAME: Final = "urn:loopnet-metering:dev"
"""Its name in `iss` where METERING_OIDC_ISSUER gives none."""
SESSION_TIME: Final = timedelta(hours=8)
_MAX_TEXT: Final = 200
"""Characters of a name or an email address; browsers drop cookies of more than 4 KiB."""


class DevIssuer:
    """Signs a session for whoever is asked for, and publishes the key."""

    def __init__(self, private: RSAPrivateKey, *, name: str, audience: str) -> None:
        self._private = private
        self._audience = audience
        self.name = name
        public = private.public_key()
        encoded = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self._key_id = urlsafe_b64encode(sha256(encoded).digest()).rstrip(b"=").decode()
        self.published: JWKDict = {
            **RSAAlgorithm.to_jwk(public, as_dict=True),
            "kid": self._key_id,
            "use": "sig",
            "alg": ALGORITHM,
        }
        """The public key as a JSON Web Key."""
        self.keys = FixedKeys(PyJWK(self.published))

    @classmethod
    def of(cls, settings: Settings) -> "DevIssuer":
        """The issuer of this data directory; its key is made on first use.

        Raises:
            ConfigurationError: the key file cannot be used.
        """
        log.warning("anybody may log in as anybody", page="/dev/login")
        return cls(
            _kept_key(settings.data_dir / KEY_FILE),
            name=settings.oidc_issuer or NAME,
            audience=settings.oidc_audience,
        )

    def session(self, user: User, now: datetime) -> tuple[str, datetime]:
        """A token for this user, with the claims of Keycloak's, and when it expires."""
        expires_at = now + SESSION_TIME
        claims = {
            "iss": self.name,
            "sub": user.id,
            "azp": self._audience,
            "typ": ACCESS_TOKEN,
            "iat": int(now.timestamp()),
            "exp": int(expires_at.timestamp()),
            "email": user.email and user.email[:_MAX_TEXT],
            "name": user.name and user.name[:_MAX_TEXT],
            "realm_access": {"roles": ["user", *([SYSTEM_ADMIN] if user.is_system_admin else [])]},
        }
        token = jwt.encode(claims, self._private, ALGORITHM, {"kid": self._key_id})
        return token, expires_at


def _kept_key(path: Path) -> RSAPrivateKey:
    """The key in this file; of processes that make it at the same time, all take the first one."""
    try:
        if not path.exists():
            _make_key(path)
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be used: {error}; remove it") from None
    if not isinstance(key, RSAPrivateKey) or key.key_size < MIN_KEY_BITS:
        raise ConfigurationError(f"{path} is not an RSA key of {MIN_KEY_BITS} bits: remove it")
    return key


def _make_key(path: Path) -> None:
    private = generate_private_key(public_exponent=65537, key_size=MIN_KEY_BITS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent) as draft:  # readable by its owner only
        draft.write(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        draft.flush()
        with suppress(FileExistsError):
            os.link(draft.name, path)
