"""An issuer of sessions as Keycloak is one: keys that it publishes over HTTP, tokens it signs."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from ops.servers import LOOPBACK

AUDIENCE = "loopnet-metering"
Claims = dict[str, Any]


class Key:
    """A key pair of the issuer."""

    def __init__(self, bits: int = 2048) -> None:
        self.id = uuid4().hex
        self.private = rsa.generate_private_key(public_exponent=65537, key_size=bits)

    def published(self, **others: Any) -> Claims:
        """The public key as Keycloak publishes it, unless `others` say otherwise."""
        public = RSAAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        usual = public | {"kid": self.id, "use": "sig", "alg": "RS256"}
        return {key: value for key, value in (usual | others).items() if value is not None}


class Issuer:
    """Signs sessions; publishes `keys`, and counts in `fetches` who asked for them.

    It answers `document` instead where there is one, an error while it `is_away`, not before it
    `may_answer`, and a hundred bytes a second while it `trickles`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys = [Key()]
        self.fetches = 0
        self.is_away = False
        self.trickles = False
        self.document: bytes | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    @property
    def jwks_url(self) -> str:
        return f"{self.url}/protocol/openid-connect/certs"

    def published(self) -> bytes:
        if self.document is not None:
            return self.document
        return json.dumps({"keys": [key.published() for key in self.keys]}).encode()

    def claims(self, user_id: str, *, system_admin: bool = False, **others: Any) -> Claims:
        """What an access token of this user says, unless `others` say otherwise."""
        now = int(time.time())
        usual = {
            "iss": self.url,
            "sub": user_id,
            "azp": AUDIENCE,
            "typ": "Bearer",
            "iat": now,
            "exp": now + 300,
            "email": f"{user_id}@example.com",
            "name": user_id.title(),
            "realm_access": {"roles": ["system_admin"] if system_admin else ["user"]},
        }
        return {key: value for key, value in (usual | others).items() if value is not None}

    def sign(
        self,
        claims: Claims,
        key: Key | None = None,
        algorithm: str = "RS256",
        headers: Claims | None = None,
    ) -> str:
        key = key or self.keys[0]
        return jwt.encode(claims, key.private, algorithm, {"kid": key.id} | (headers or {}))

    def session(self, user_id: str, *, system_admin: bool = False, **others: Any) -> str:
        return self.sign(self.claims(user_id, system_admin=system_admin, **others))


@contextmanager
def running_issuer() -> Iterator[Issuer]:
    class Certs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.fetches += 1
            body = issuer.published()
            issuer.may_answer.wait(20)
            self.send_response(503 if issuer.is_away else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for part in [bytes([byte]) for byte in body] if issuer.trickles else [body]:
                self.wfile.write(part)
                time.sleep(0.01 if issuer.trickles else 0)

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                """Whoever asked has given up waiting."""

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((LOOPBACK, 0), Certs) as server:
        issuer = Issuer(f"http://{LOOPBACK}:{server.server_port}/realms/loopnet")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield issuer
        finally:
            issuer.may_answer.set()
            server.shutdown()
            thread.join()
