# SPDX-License-Identifier: Apache-2.0
"""Who may ask a running gateway: keys, tokens, TLS, other websites; in both dialects."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import openai
import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub import InferenceClient

from arrowhead_client.cli import main
from arrowhead_server.supervisor import Server

from .conftest import wait_until
from .gateways import started, stopped
from .issuer import AUDIENCE, ISSUER, Issuer, running_issuer

SITE = "https://app.example.org"
TEI, OPENAI = "/embed", "/v1/embeddings"
BODY = {"inputs": "a text", "input": "a text", "model": "minilm"}


def made_key(name: str, file: Path) -> str:
    command = [str(Path(sys.executable).with_name("arrowhead")), "gateway-key", name]
    done = subprocess.run(
        [*command, "--keys", str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with running_issuer() as issuer:
        for algorithm in ("RS256", "ES256", "EdDSA"):
            issuer.add(algorithm, algorithm)
        yield issuer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("access")


@pytest.fixture(scope="module")
def alice(folder: Path) -> str:
    return made_key("alice", folder / "keys")


@pytest.fixture(scope="module")
def running(
    server: Server, issuer: Issuer, folder: Path, alice: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with (folder / "log").open("wb") as log:
        process, url = started(
            f"--url={server.grpc_url}",
            f"--keys={folder / 'keys'}",
            f"--jwt-issuer={ISSUER}",
            f"--jwt-audience={AUDIENCE}",
            f"--jwks={issuer.url}",
            "--scope=embed",
            f"--cors-origin={SITE}",
            stderr=log,
        )
        yield process, url
        stopped(process)


@pytest.fixture(scope="module")
def url(running: tuple[Any, str]) -> str:
    return running[1]


@pytest.fixture(scope="module")
def ask(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as ask:
        yield ask


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def told(answer: httpx.Response) -> str:
    """The message, from either dialect's body."""
    error = answer.json()["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def test_a_key_lets_the_clients_of_both_dialects_in(
    ask: httpx.Client, url: str, alice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (TEI, OPENAI):
        assert ask.post(path, json=BODY, headers=bearer(alice)).status_code == 200
    with openai.OpenAI(base_url=f"{url}/v1", api_key=alice, max_retries=0) as official:
        assert len(official.embeddings.create(model="minilm", input="a").data) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it asks us, no hub
    hub = InferenceClient(base_url=f"{url}/embed", api_key=alice)
    assert hub.feature_extraction("a").shape == (1, 384)


def test_without_a_right_one_nobody_is_let_in(ask: httpx.Client, url: str, alice: str) -> None:
    for headers, message, error in (
        ({}, "no key: wanted the header 'Authorization: Bearer KEY'", False),
        ({"Authorization": f"Basic {alice}"}, "no key", False),
        ({"Authorization": "Bearer"}, "no key", False),
        ({"x-api-key": alice}, "no key", False),
        (bearer(alice[:-1]), "this key is none that is known here", True),
        ({"Authorization": b"Bearer \xfc\xff"}, "the token is not let in", True),
    ):
        tei = ask.post(TEI, json=BODY, headers=headers)
        other = ask.post(OPENAI, json=BODY, headers=headers)
        assert (tei.status_code, set(tei.json())) == (401, {"error", "error_type"})
        assert (other.status_code, other.json()["error"]["code"]) == (401, "invalid_api_key")
        for answer in (tei, other):
            assert message in told(answer)
            challenge = answer.headers["WWW-Authenticate"]
            assert challenge.startswith('Bearer realm="arrowhead"')
            assert ('error="invalid_token"' in challenge) is error
    two = [("Authorization", f"Bearer {alice}"), ("Authorization", f"Bearer {alice}")]
    assert ask.post(TEI, json=BODY, headers=two).status_code == 401
    official = openai.OpenAI(base_url=f"{url}/v1", api_key="ah_other", max_retries=0)
    with official, pytest.raises(openai.AuthenticationError):
        official.embeddings.create(model="minilm", input="a")


def test_a_strangers_body_is_not_read(ask: httpx.Client) -> None:
    host, port = ask.base_url.host, ask.base_url.port
    with socket.create_connection((host, port or 80), timeout=10) as line:
        line.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 401")


def test_probes_metrics_and_pages_are_open_and_nothing_else(ask: httpx.Client, url: str) -> None:
    assert {
        path: ask.get(path).status_code
        for path in ("/health", "/ready", "/metrics", "/", "/docs", "/openapi.json", "/info")
    } == {
        "/health": 200,
        "/ready": 200,
        "/metrics": 200,
        "/": 200,
        "/docs": 200,
        "/openapi.json": 200,
        "/info": 401,
    }
    infer = ask.post("/v2/models/minilm/infer", json={})
    assert (infer.status_code, set(infer.json())) == (401, {"error"})
    assert ask.post("/docs").status_code == 401
    assert ask.post("/", json=BODY).status_code == 401
    for path in ("/v1/models", "/no/such", "/health/", "//health", "/page/../info", "/page/"):
        assert httpx.get(url + path).status_code == 401, path
    schemes = ask.get("/openapi.json").json()["components"]["securitySchemes"]
    assert schemes["HTTPBearer"]["scheme"] == "bearer"


def test_the_file_of_keys_is_followed(ask: httpx.Client, folder: Path, alice: str) -> None:
    file = folder / "keys"

    def status(key: str) -> int:
        return ask.post(TEI, json=BODY, headers=bearer(key)).status_code

    bob = made_key("bob", file)
    again = made_key("bob", file)  # his next one, while the old one holds
    wait_until(lambda: status(bob) == status(again) == 200, "bob's keys")
    lines = file.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["alice", "bob", "bob"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert bob not in file.read_text()

    file.write_text(f"{lines[0]}\n# not his any more\n{lines[2]}\n")
    wait_until(lambda: status(bob) == 401, "bob's first key to be gone")
    assert (status(alice), status(again)) == (200, 200)

    # What cannot be read changes nothing, and is told.
    log = folder / "log"
    for break_it, message in (
        (lambda: file.write_text("alice: sha256\n"), "line 1: wanted NAME sha256:64"),
        (lambda: file.chmod(0o644), "is open to others (mode 644)"),
        (file.unlink, "cannot read"),
    ):
        break_it()
        wait_until(lambda m=message: status(alice) == 200 and m in log.read_text(), message)  # type: ignore[misc]
    file.touch(0o600)
    file.write_text(lines[0])
    wait_until(lambda: status(again) == 401, "bob to be gone")
    assert status(alice) == 200


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_token_lets_in(ask: httpx.Client, issuer: Issuer, algorithm: str) -> None:
    for claims in ({}, {"scope": None, "scp": ["embed"]}, {"aud": ["x", AUDIENCE]}):
        token = issuer.sign(algorithm, **claims)
        for path in (TEI, OPENAI):
            answer = ask.post(path, json=BODY, headers=bearer(token))
            assert answer.status_code == 200, answer.text


def test_a_token_that_is_wrong_does_not(ask: httpx.Client, issuer: Issuer) -> None:
    right = issuer.sign("RS256")
    head, claims, signature = right.split(".")
    public = issuer.keys["RS256"][1].public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    now = datetime.datetime.now(datetime.timezone.utc).timestamp()
    for wrong, message in (
        (issuer.sign("RS256", exp=int(now - 60)), "expired"),
        (issuer.sign("RS256", nbf=int(now + 60)), "not yet valid"),
        (issuer.sign("RS256", exp=None), 'missing the "exp" claim'),
        (issuer.sign("RS256", sub=None), 'missing the "sub" claim'),
        (issuer.sign("RS256", aud="https://other.example.org"), "Audience"),
        (issuer.sign("RS256", iss="https://evil.example.org"), "issuer"),
        (issuer.sign("RS256", headers={"kid": "ES256"}), "alg"),
        (issuer.sign("RS256", headers={}), "none of its issuer's"),
        (issuer.sign("RS256", headers={"kid": "unheard"}), "none of its issuer's"),
        (f"{head}.{claims}.{signature[:-8]}AAAAAAAA", "Signature"),
        (f"{head}.{claims}x.{signature}", "not let in"),
        (f"{head}.{claims}.", "Signature"),
        (jwt.encode(issuer.claims(), None, "none", headers={"kid": "RS256"}), "alg"),
        # Signed with what everybody knows.
        (hmac_signed(issuer.claims(), pem, "RS256"), "alg"),
    ):
        answer = ask.post(TEI, json=BODY, headers=bearer(wrong))
        assert answer.status_code == 401, (message, answer.text)
        assert message in told(answer)
        assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    # A clock that is a little behind is not held against its owner.
    late = issuer.sign("RS256", exp=int(now - 10))
    assert ask.post(TEI, json=BODY, headers=bearer(late)).status_code == 200


def hmac_signed(claims: dict[str, Any], secret: bytes, kid: str) -> str:
    """As jwt refuses to: with a public key as an HMAC's secret."""
    import hashlib
    import hmac
    import json
    from base64 import urlsafe_b64encode

    parts = [
        urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
        for part in ({"alg": "HS256", "typ": "JWT", "kid": kid}, claims)
    ]
    mac = hmac.new(secret, b".".join(parts), hashlib.sha256).digest()
    return b".".join([*parts, urlsafe_b64encode(mac).rstrip(b"=")]).decode()


def test_a_token_without_the_scope_is_forbidden(ask: httpx.Client, issuer: Issuer) -> None:
    token = issuer.sign("RS256", scope="read embeddings")
    tei = ask.post(TEI, json=BODY, headers=bearer(token))
    other = ask.post(OPENAI, json=BODY, headers=bearer(token))
    assert (tei.status_code, other.status_code) == (403, 403)
    assert other.json()["error"]["code"] == "insufficient_permissions"
    for answer in (tei, other):
        assert "has not the scope embed" in told(answer)
        challenge = answer.headers["WWW-Authenticate"]
        assert 'error="insufficient_scope", scope="embed"' in challenge


def test_it_tells_where_tokens_come_from(ask: httpx.Client, url: str) -> None:
    place = f"{url}/.well-known/oauth-protected-resource"
    assert f'resource_metadata="{place}"' in ask.get("/info").headers["WWW-Authenticate"]
    assert httpx.get(place).json() == {
        "resource": AUDIENCE,
        "authorization_servers": [ISSUER],
        "scopes_supported": ["embed"],
        "bearer_methods_supported": ["header"],
    }


def test_pages_of_a_named_site_may_ask_and_of_no_other(ask: httpx.Client, alice: str) -> None:
    def preflight(origin: str) -> httpx.Response:
        wish = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        return ask.options(TEI, headers=wish)

    assert preflight(SITE).status_code == 200
    assert preflight(SITE).headers["Access-Control-Allow-Origin"] == SITE
    assert preflight("https://evil.example.org").status_code == 400
    for headers, status in ((bearer(alice), 200), ({}, 401)):  # a refusal is read, too
        answer = ask.post(TEI, json=BODY, headers={**headers, "Origin": SITE})
        assert answer.status_code == status
        assert answer.headers["Access-Control-Allow-Origin"] == SITE
        assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
    other = ask.post(TEI, json=BODY, headers={**bearer(alice), "Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


def test_no_secret_is_in_log_metrics_or_arguments(
    ask: httpx.Client,
    running: tuple[subprocess.Popen[bytes], str],
    folder: Path,
    issuer: Issuer,
    alice: str,
) -> None:
    token = issuer.sign("RS256", sub="a subject")
    ask.post(TEI, json=BODY, headers=bearer(token))
    ask.post(TEI, json=BODY, headers=bearer(issuer.sign("RS256", scope="read")))
    ask.post(TEI, json=BODY, headers=bearer(alice + "x"))
    metrics = ask.get("/metrics").text
    seen = metrics + (folder / "log").read_text()
    seen += Path(f"/proc/{running[0].pid}/cmdline").read_text()
    for secret in (alice, token, token.split(".")[2], "a subject"):
        assert secret not in seen
    for reason in ("key", "scope"):
        assert f'arrowhead_gateway_refused_total{{reason="{reason}"}}' in metrics


def test_keys_from_the_environment(server: Server, tmp_path: Path) -> None:
    key = made_key("alice", tmp_path / "keys")
    lines = (tmp_path / "keys").read_text()
    process, url = started(
        f"--url={server.grpc_url}", env={**os.environ, "ARROWHEAD_GATEWAY_KEYS": lines}
    )
    try:
        assert httpx.post(url + TEI, json=BODY, headers=bearer(key)).status_code == 200
        refused = httpx.post(url + TEI, json=BODY, headers=bearer(key + "x"))
        assert (refused.status_code, told(refused)) == (
            401,
            "this key is none that is known here",
        )
        # Off until configured.
        asked = httpx.post(url + TEI, json=BODY, headers={**bearer(key), "Origin": SITE})
        assert "Access-Control-Allow-Origin" not in asked.headers
        assert httpx.get(f"{url}/.well-known/oauth-protected-resource").status_code == 404
    finally:
        stopped(process)


@pytest.fixture(scope="module")
def certificate(folder: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(private, hashes.SHA256())
    )
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.touch(0o600)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return cert, key


def test_tls(server: Server, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=str(cert))
    process, url = started(
        f"--url={server.grpc_url}",
        f"--tls-cert={cert}",
        f"--tls-key={key}",
        scheme="https",
        verify=trusting,
    )
    try:
        assert httpx.post(url + TEI, json=BODY, verify=trusting).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url)
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
    finally:
        stopped(process)


@pytest.fixture
def run() -> Callable[..., Result]:
    """The command, which must end by itself: it is told something that it cannot run with."""
    return lambda *options, **extra: CliRunner().invoke(main, ["gateway", *options], **extra)


def test_others_are_not_listened_to_unless_it_is_said_who_may_ask(
    run: Callable[..., Result], server: Server, folder: Path
) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):  # noqa: S104
        refused = run("--host", host)
        assert refused.exit_code == 2
        assert f"others reach --host {host}: wanted --keys FILE" in refused.stderr
        assert "--open" in refused.stderr
    both = run("--open", "--keys", str(folder / "keys"))
    assert (both.exit_code, "choose" in both.stderr) == (2, True)
    process, url = started(f"--url={server.grpc_url}", "--host=0.0.0.0", "--open")
    try:
        assert httpx.post(url + TEI, json=BODY).status_code == 200
    finally:
        stopped(process)


def test_what_it_cannot_run_with_is_told_in_a_line(
    run: Callable[..., Result], tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    good, open_to_others, bad, empty = (tmp_path / name for name in ("good", "open", "bad", "no"))
    made_key("alice", good)
    open_to_others.write_text(good.read_text())
    open_to_others.chmod(0o604)
    for file, text in ((bad, "ah_a_key_in_the_clear\n"), (empty, "# none yet\n")):
        file.touch(0o600)
        file.write_text(text)
    cert, key = certificate
    for options, message in (
        (["--keys", str(open_to_others)], f"chmod 600 {open_to_others}"),
        (["--keys", str(bad)], "line 1: wanted NAME sha256:64"),
        (["--keys", str(empty)], "no key to let anybody in by"),
        (["--keys", str(tmp_path / "none")], "cannot read"),
        (["--jwt-issuer", ISSUER], "need all of --jwt-issuer, --jwt-audience and --jwks"),
        (token_options("http://issuer.example.org/jwks"), "wanted https"),
        (token_options(str(bad)), "is no JSON Web Key Set"),
        (["--tls-cert", str(cert)], "both --tls-cert and --tls-key"),
        (["--tls-cert", str(cert), "--tls-key", str(good)], "no TLS with"),
        (["--rate", "often"], "wanted such as 100/second"),
        (["--rate-store", "redis://localhost"], "counts for --rate"),
        (
            ["--rate", "1/second", "--rate-store", "memcached://x"],
            "wanted redis://:password@host:port",
        ),
        (["--rate-store", "redis://:secret@localhost"], "ARROWHEAD_RATE_STORE"),
        (["--rate-store", "redis://localhost?password=secret"], "ARROWHEAD_RATE_STORE"),
        (["--rate-store", "redis://[::1"], "no URL"),
        (["--rate", "1/second", "--rate-store", "redis://h:secret"], "wanted redis://"),
        (["--max-texts", "20000"], "wanted more than that as --max-memory-mb, which is 512"),
        (["--proxy", "*"], "such as 10.0.0.7"),
        (["--cors-origin", "app.example.org"], "wanted such as https://app.example.org"),
    ):
        result = run(*options)
        assert result.exit_code in (1, 2), (options, result.output, result.exception)
        assert message in " ".join(result.stderr.split()), result.stderr
        assert "ah_a_key" not in result.stderr
        assert "secret" not in result.stderr
    key.chmod(0o640)
    assert "no TLS" not in run("--tls-cert", str(cert), "--tls-key", str(key), "--rate", "x").stderr
    key.chmod(0o644)
    assert "is open to others" in run("--tls-cert", str(cert), "--tls-key", str(key)).stderr
    key.chmod(0o600)


def token_options(jwks: str) -> list[str]:
    return ["--jwt-issuer", ISSUER, "--jwt-audience", AUDIENCE, "--jwks", jwks]


def test_a_key_is_added_where_a_link_points_to(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "keys"
    made_key("alice", file)
    link.symlink_to(file)
    made_key("bob", link)
    assert link.is_symlink()
    assert [line.split()[0] for line in file.read_text().splitlines()] == ["alice", "bob"]


def test_a_made_key_is_shown_with_its_line() -> None:
    result = CliRunner().invoke(main, ["gateway-key", "alice"])
    _, line, _, key = result.stdout.splitlines()
    assert line.startswith("alice sha256:")
    assert key.startswith("ah_")
    assert len(key) > 40
    refused = CliRunner().invoke(main, ["gateway-key", "two words"])
    assert (refused.exit_code, "wanted 1 to 64 letters" in refused.stderr) == (1, True)
    assert "Limits:" in CliRunner().invoke(main, ["gateway", "--help"]).stdout
