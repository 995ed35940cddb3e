"""Tokens that stand for a key: signed, short-lived, never longer-lived than asked for, dead with their key."""

from __future__ import annotations

import time
from typing import Any

import jwt
import pytest
from litestar.testing import TestClient

from tests.contract.conftest import Api
from tests.contract.routes import closed_routes, concrete
from tinsmith.api.app import build_app, with_edge
from tinsmith.api.tokens import Tokens
from tinsmith.signing import Signer


@pytest.fixture
def house(make_house: Any) -> Any:
    return make_house(jwt_auth=True)


def sent(token: str) -> dict[str, str]:
    return {"X-API-Key": token}


def test_a_token_speaks_for_its_key(house: Any, api: Any, anonymous: Any) -> None:
    assert api.post("/client/config", {"sdk_version": "0"})["pjwt_auth_enabled"] is True
    token = api.post("/auth/token")["jwt"]
    session = api.session()
    assert anonymous.get("/sessions", headers=sent(token))["sessions"] == [session]
    assert anonymous.get("/sessions", headers={"Authorization": f"Bearer {token}"})["sessions"] == [session]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims["exp"] - claims["iat"] == pytest.approx(house.settings.jwt_ttl_s)
    assert claims["sub"] == f"tml:organization_user:{house.tenant_id}"
    assert claims["org_id"] == house.tenant_id
    assert house.key not in str(claims)


def test_a_token_ends_with_its_key(api: Any, anonymous: Any) -> None:
    made = api.post("/admin/keys", {"name": "ci", "tenant": "carol"})
    token = anonymous.post("/auth/token", headers=sent(made["secret"]))["jwt"]
    anonymous.get("/sessions", headers=sent(token))
    anonymous.call("DELETE", "/auth/apikey/me", 204, headers=sent(made["secret"]))
    anonymous.get("/sessions", 401, headers=sent(token))
    anonymous.get("/sessions", 401, headers=sent(made["secret"]))
    anonymous.post("/auth/token", status=401, headers=sent(token))


def lasting() -> list[str]:
    """ "METHOD /path" of what an administrator's token may not do: all but looking at runs and figures."""
    return [route for route in closed_routes() if "/admin/" in route and route != "GET /admin/runs"]


def test_what_lasts_asks_for_the_key_itself(api: Any, anonymous: Any) -> None:
    made = api.post("/admin/keys", {"name": "ops", "tenant": "alice", "is_admin": True})
    token = anonymous.post("/auth/token", headers=sent(made["secret"]))["jwt"]
    assert len(lasting()) == 8
    calls = [
        ("POST", "/admin/keys", {"json": {"name": "forever", "tenant": "alice", "is_admin": True}}),
        ("GET", "/admin/keys", {}),
        ("DELETE", f"/admin/keys/{made['key_id']}", {}),
        ("DELETE", "/auth/apikey/me", {}),
        *((*concrete(route), {}) for route in lasting()),
    ]
    before = api.get("/admin/keys")
    for method, path, options in calls:
        for headers in (sent(token), {"Authorization": f"Bearer {token}"}):
            problem = anonymous.call(method, path, 403, headers=headers, **options)
            assert (problem["code"], problem["category"]) == ("forbidden", "user")
            assert "the key itself" in problem["detail"]
    assert api.get("/admin/keys") == before
    assert anonymous.get("/auth/apikey/me", headers=sent(token))["name"] == "ops"
    anonymous.get("/admin/runs", headers=sent(token))
    for (method, path, options), status in zip(calls[1:3], (200, 200), strict=True):
        anonymous.call(method, path, status, headers=sent(made["secret"]), **options)


def test_a_token_cannot_be_prolonged(house: Any, api: Any, anonymous: Any) -> None:
    principal = house.store.tenants.authenticate(house.key)
    short = Tokens(house.services.signer, 20.0).issue(principal)
    renewed = anonymous.post("/auth/token", headers=sent(short))["jwt"]
    ends = [jwt.decode(token, options={"verify_signature": False})["exp"] for token in (short, renewed)]
    assert ends[1] <= ends[0]


def forged(house: Any, **changes: Any) -> list[str]:
    """Tokens that somebody made without the secret, or that have ended."""
    claims = jwt.decode(
        Tokens(house.services.signer, 100.0).issue(house.store.tenants.authenticate(house.key)),
        options={"verify_signature": False},
    )
    secret = house.services.signer.sign("jwt")
    good = jwt.encode(claims, secret, algorithm="HS256")
    head, body, signature = good.split(".")
    return [
        jwt.encode(claims, "another secret that is long enough", algorithm="HS256"),
        jwt.encode(claims, None, algorithm="none"),
        jwt.encode(claims, secret, algorithm="HS512"),
        jwt.encode({**claims, "exp": time.time() - 1}, secret, algorithm="HS256"),
        jwt.encode({**claims, "iss": "somebody"}, secret, algorithm="HS256"),
        jwt.encode({k: v for k, v in claims.items() if k != "exp"}, secret, algorithm="HS256"),
        jwt.encode({**claims, "exp": "soon"}, secret, algorithm="HS256"),
        jwt.encode({**claims, "exp": [1]}, secret, algorithm="HS256"),
        Tokens(Signer(b"x" * 32), 100.0).issue(house.store.tenants.authenticate(house.key)),
        f"{head}.{body}.",
        f"{head}.{signature}.{body}",
        "eyJ",
        "eyJ" + "x" * 3000,
    ]


def test_other_tokens_are_refused_as_such(house: Any, anonymous: Any) -> None:
    """The header makes the client exchange its key for a new token, once."""
    for token in forged(house):
        response = anonymous.raw("GET", "/api/v1/sessions", headers=sent(token))
        assert (response.status_code, response.json()["code"]) == (401, "invalid_token")
        assert 'error="invalid_token"' in response.headers["www-authenticate"]
        assert anonymous.raw("POST", "/api/v1/auth/token", headers=sent(token)).status_code == 401


def test_a_wrong_key_is_not_answered_as_a_wrong_token(anonymous: Any) -> None:
    response = anonymous.raw("POST", "/api/v1/auth/token", headers=sent("tml-wrong"))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_secret_is_for_its_owners_eyes(house: Any) -> None:
    file = house.settings.data_dir / "signing.key"
    assert file.stat().st_mode & 0o777 == 0o600


def test_without_the_setting_there_are_no_tokens(make_house: Any, tmp_path: Any) -> None:
    plain = make_house(data_dir=tmp_path / "plain")
    token = Tokens(plain.services.signer, 100.0).issue(plain.store.tenants.authenticate(plain.key))
    with TestClient(with_edge(build_app(plain.services))) as client:
        api = Api(client, plain.key)
        assert api.post("/client/config", {})["pjwt_auth_enabled"] is False
        assert "--jwt-auth" in api.post("/auth/token", status=400)["detail"]
        assert api.get("/sessions", 401, headers=sent(token))["code"] == "unauthorized"


def test_a_key_about_itself(api: Any, other: Any) -> None:
    mine, theirs = api.get("/auth/apikey/me"), other.get("/auth/apikey/me")
    assert mine["name"] == "laptop"
    assert mine["details"] == {"org_details": {"name": "alice"}, "user_details": {"email": "alice"}}
    assert 0 <= mine["key_id"] < 2**53
    assert mine["key_id"] != theirs["key_id"]
    keys = {key["key_id"]: key["name"] for key in api.get("/admin/keys")["keys"]}
    assert keys[mine["note"]] == "laptop"
