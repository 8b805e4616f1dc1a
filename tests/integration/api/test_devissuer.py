"""The development issuer: a login page without passwords, and sessions like all others."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import jwt
import pytest
from jwt import PyJWK

from api.app import create_app
from api.devissuer import KEY_FILE, NAME, DevIssuer
from ledger import people
from schema.errors import ConfigurationError
from schema.settings import Environment, Settings, load_settings
from tests.integration.api.conftest import Callers, serving
from tests.integration.api.issuer import AUDIENCE
from tests.integration.ledger.world import World

LOGIN = "/dev/login"
NOWHERE = "/api/v1/nothing"
LET_IN = 404
PROGRAM = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def dev_settings(api_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    changes = {"oidc_issuer": "", "dev_issuer": True, "data_dir": tmp_path_factory.mktemp("dev")}
    return api_settings.model_copy(update=changes)


@pytest.fixture(scope="module")
def running(dev_settings: Settings) -> Iterator[httpx.Client]:
    with serving(create_app(dev_settings)) as client:
        yield client


@pytest.fixture
def browser(running: httpx.Client) -> Iterator[httpx.Client]:
    """A client that keeps its own cookies."""
    with httpx.Client(base_url=running.base_url, timeout=20) as client:
        yield client


def log_in(client: httpx.Client, user_id: str = "ada", **fields: str) -> httpx.Response:
    return client.post(LOGIN, data={"user_id": user_id} | fields)


def test_a_session_is_like_any_other(browser: httpx.Client) -> None:
    assert browser.get(NOWHERE).status_code == 401
    answer = log_in(browser)
    assert (answer.status_code, answer.headers["Location"]) == (303, LOGIN)
    assert browser.get(NOWHERE).status_code == LET_IN
    assert "<strong>ada</strong>" in browser.get(LOGIN).text


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(browser: httpx.Client) -> None:
    name, _, rest = log_in(browser).headers["Set-Cookie"].partition("=")
    _, *attributes = rest.split("; ")
    assert name == "session_token"
    assert set(attributes) == {"HttpOnly", "SameSite=lax", "Path=/", "Max-Age=28800"}


def test_its_key_is_published_and_checks_its_sessions(
    browser: httpx.Client, dev_settings: Settings
) -> None:
    log_in(browser, "ada", system_admin="on")
    (key,) = browser.get("/dev/jwks").raise_for_status().json()["keys"]
    assert key.keys() == {"kty", "kid", "use", "alg", "n", "e", "key_ops"}
    claims = jwt.decode(
        browser.cookies["session_token"], PyJWK(key), ["RS256"], options={"verify_aud": False}
    )
    assert (claims["iss"], claims["sub"], claims["azp"]) == (NAME, "ada", AUDIENCE)
    assert claims["realm_access"] == {"roles": ["user", "system_admin"]}
    assert claims["exp"] - claims["iat"] == 8 * 3600
    file = dev_settings.data_dir / KEY_FILE
    assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in dev_settings.data_dir.iterdir()) == [KEY_FILE]


def test_sessions_of_the_realm_do_not_count_here(browser: httpx.Client, callers: Callers) -> None:
    assert browser.get(NOWHERE, headers=callers.user("ada")).status_code == 401


def test_a_program_is_answered_with_json(browser: httpx.Client) -> None:
    answer = browser.post(LOGIN, data={"user_id": "ada"}, headers=PROGRAM)
    assert answer.status_code == 200
    assert answer.json().keys() == {"user_id", "expires_at"}
    assert answer.json()["user_id"] == "ada"
    assert browser.get(NOWHERE).status_code == LET_IN
    assert browser.post("/dev/logout", headers=PROGRAM).status_code == 204
    assert browser.get(NOWHERE).status_code == 401


def test_logging_out_forgets_the_session(browser: httpx.Client) -> None:
    log_in(browser)
    answer = browser.post("/dev/logout")
    assert (answer.status_code, answer.headers["Location"]) == (303, LOGIN)
    assert browser.get(NOWHERE).status_code == 401
    assert "Log out" not in browser.get(LOGIN).text


def test_the_page_lists_who_there_is(browser: httpx.Client, api_world: World) -> None:
    ada, eve = f"ada-{uuid4().hex}", f"eve-{uuid4().hex}"
    api_world.organization(members={ada: "admin", eve: "member"})
    api_world.sql.execute(
        "UPDATE organization_members SET name = 'Ada L', email = 'a@x.example' WHERE user_id = %s",
        (ada,),
    )
    page = browser.get(LOGIN)
    assert page.status_code == 200
    assert page.headers["Content-Type"].startswith("text/html")
    for text in (ada, eve, "Ada L", "a@x.example", "admin", "An organization", "system admin"):
        assert text in page.text
    log_in(browser, ada)
    claims = jwt.decode(browser.cookies["session_token"], options={"verify_signature": False})
    assert (claims["name"], claims["email"]) == ("Ada L", "a@x.example")


def test_the_page_runs_nothing_and_loads_nothing(browser: httpx.Client, api_world: World) -> None:
    odd = f'<script>alert("{uuid4().hex}")</script>'
    api_world.organization(members={odd: "member"})
    page = browser.get(LOGIN)
    assert odd not in page.text
    assert odd.split('"')[1] in page.text
    assert "<script" not in page.text
    assert re.findall(r"(?:src|href)\s*=|https?://|//", page.text) == []
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/console", "/console/?org=1&x=%2F#a", "/a//b"])
def test_after_the_login_the_browser_goes_on(browser: httpx.Client, path: str) -> None:
    page = browser.get(LOGIN, params={"next": path})
    assert path.replace("&", "&amp;") in page.text
    answer = log_in(browser, next=path)
    assert (answer.status_code, answer.headers["Location"]) == (303, path)


@pytest.mark.parametrize(
    "path",
    ["//evil.example", "https://evil.example", r"/\evil.example", "/\t/evil.example", "evil",
     "\\/evil.example", " /x", "/\n/x", "javascript:alert(1)", "/" + "x" * 2001],
)  # fmt: skip
def test_it_goes_nowhere_else(browser: httpx.Client, path: str) -> None:
    for answer in (log_in(browser, next=path), browser.get(LOGIN, params={"next": path})):
        assert answer.status_code == 422
        assert answer.json()["detail"]["error"] == "invalid_request"
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("user_id", ["", "a" * 256, "a\x00b"])
def test_a_user_id_that_nobody_can_have_is_refused(browser: httpx.Client, user_id: str) -> None:
    assert log_in(browser, user_id).status_code == 422


def test_forms_hold_nothing_else(browser: httpx.Client) -> None:
    assert log_in(browser, role="root").status_code == 422
    assert browser.post(LOGIN).status_code == 422
    assert browser.post(LOGIN, files={"user_id": b"ada"}).status_code == 422


@pytest.mark.parametrize("path", [LOGIN, "/dev/logout"])
def test_pages_of_other_sites_log_nobody_in_or_out(browser: httpx.Client, path: str) -> None:
    own = f"http://{browser.base_url.netloc.decode()}"
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        (own, 303),
        ("http://localhost:3000", 303),
    ):
        answer = browser.post(path, data={"user_id": "ada"}, headers={"Origin": origin})
        assert answer.status_code == status, origin
        assert ("Set-Cookie" in answer.headers) == (status == 303)


def test_without_the_setting_there_is_no_such_page(api: httpx.Client) -> None:
    for method, path in (("GET", LOGIN), ("POST", LOGIN), ("GET", "/dev/jwks")):
        assert api.request(method, path).status_code == 404


def test_the_key_is_made_once(tmp_path: Path) -> None:
    settings = load_settings(dev_issuer=True, data_dir=tmp_path / "new")
    with ThreadPoolExecutor(4) as pool:  # as the processes of one API do
        issuers = list(pool.map(DevIssuer.of, [settings] * 4))
    assert len({issuer.published["kid"] for issuer in issuers}) == 1
    assert DevIssuer.of(settings).published == issuers[0].published


def test_it_may_bear_another_name(tmp_path: Path) -> None:
    settings = load_settings(
        dev_issuer=True, data_dir=tmp_path, oidc_issuer="https://id.example/realms/x"
    )
    assert DevIssuer.of(settings).name == "https://id.example/realms/x"


def test_a_damaged_key_is_told(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("hunter2")
    with pytest.raises(ConfigurationError, match="remove it"):
        DevIssuer.of(load_settings(dev_issuer=True, data_dir=tmp_path))


def test_production_refuses_it() -> None:
    with pytest.raises(ConfigurationError, match="production"):
        load_settings(dev_issuer=True, env=Environment.PRODUCTION)


def test_the_page_lists_no_more_than_it_says(api_world: World) -> None:
    prefix = f"!{uuid4().hex}"  # sorts before all others
    api_world.organization(members={f"{prefix}-{n}": "member" for n in range(5)})
    listed = people.listed(api_world.database, limit=4)
    assert [person.user_id for person in listed] == [f"{prefix}-{n}" for n in range(4)]
