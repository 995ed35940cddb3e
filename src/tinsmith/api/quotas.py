"""Quotas of tenants and keys, for those who hold an admin key."""

from __future__ import annotations

import math
import time

from litestar import get, put
from litestar.params import FromQuery, JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.services import Services, ServicesDep
from tinsmith.errors import NotFoundError, UserError, echo
from tinsmith.store.quota_rules import Quota
from tinsmith.store.quotas import QuotaUse
from tinsmith.store.rows import Principal
from tinsmith.wire.requests import SetQuotas


class QuotaInfo(Struct):
    """One quota of a tenant or key; limit null: there is none."""

    quota: str
    used: float
    limit: float | None


class ScopeInfo(Struct):
    """A tenant, or one of its keys, and its quotas."""

    tenant: str
    key_id: str | None
    key_name: str | None
    quotas: list[QuotaInfo]


class QuotaList(Struct):
    scopes: list[ScopeInfo]


@get("/admin/quotas")
async def list_quotas(request: Call, services: ServicesDep, tenant: FromQuery[str | None] = None) -> QuotaList:
    """All tenants, or the one of that name, with what they use; and those of their keys that have quotas."""
    return QuotaList(await services.work(_list, services, tenant))


@put("/admin/quotas")
async def set_quotas(request: Call, services: ServicesDep, data: JSONBody[SetQuotas]) -> QuotaList:
    """Set quotas, or take them away. They hold within two seconds; nothing that was accepted fails."""
    scopes = await services.write(_set, services, request.user, data)
    for base_model in services.bases:
        services.ring(base_model)
    return QuotaList(scopes)


def _set(services: Services, principal: Principal, asked: SetQuotas) -> list[ScopeInfo]:
    changes = {_quota(name): amount for name, amount in asked.quotas.items()}
    for quota, amount in changes.items():
        if amount is not None and not (math.isfinite(amount) and amount >= 0):
            raise UserError(f"{quota} is 0 or more, or null for none, not {amount}")
    tenant = services.store.tenants.by_name(asked.tenant)
    if tenant is None:
        raise NotFoundError(f"no tenant is called {echo(asked.tenant)}")
    services.store.quotas.put(tenant.tenant_id, asked.key_id, changes, time.time(), by=principal)
    return _list(services, asked.tenant)


def _list(services: Services, tenant: str | None) -> list[ScopeInfo]:
    scopes = services.store.quotas.list(time.time(), tenant)
    if tenant is not None and not scopes:
        raise NotFoundError(f"no tenant is called {echo(tenant)}")
    return [_info(scope) for scope in scopes]


def _quota(name: str) -> Quota:
    try:
        return Quota(name)
    except ValueError:
        raise UserError(f"a quota is one of {', '.join(Quota)}, not {echo(name)}") from None


def _info(scope: QuotaUse) -> ScopeInfo:
    quotas = [QuotaInfo(quota.value, scope.used[quota], scope.limits.get(quota)) for quota in Quota]
    return ScopeInfo(scope.tenant_name, scope.key_id, scope.key_name, quotas)
