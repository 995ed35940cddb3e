"""Weights of tenants, for those who hold an admin key."""

from __future__ import annotations

from litestar import get, post
from litestar.params import JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.services import ServicesDep
from tinsmith.wire.requests import SetWeight


class TenantWeight(Struct):
    tenant: str
    weight: float


class WeightList(Struct):
    weights: list[TenantWeight]


@get("/admin/weights")
async def list_weights(request: Call, services: ServicesDep) -> WeightList:
    """Of every tenant."""
    found = await services.work(services.store.weights.all)
    return WeightList(weights=[TenantWeight(tenant, weight) for tenant, weight in found.items()])


@post("/admin/weights", status_code=200)
async def set_weight(request: Call, services: ServicesDep, data: JSONBody[SetWeight]) -> TenantWeight:
    """A tenant's weight: how much it gets beside others. It holds within a second, for what waits already too."""
    await services.write(services.store.weights.set, data.tenant, data.weight, by=request.user)
    return TenantWeight(data.tenant, data.weight)
