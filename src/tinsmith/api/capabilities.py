"""What is served, and whether it is up."""

from __future__ import annotations

from litestar import Response, get
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.errors import Problem
from tinsmith.api.services import ServicesDep
from tinsmith.errors import CapacityError


class SupportedModel(Struct):
    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True


class Capabilities(Struct):
    supported_models: list[SupportedModel]


class Health(Struct):
    status: str = "ok"


@get("/get_server_capabilities")
async def get_server_capabilities(request: Call, services: ServicesDep) -> Capabilities:
    infos = [base.info for base in services.bases.values()]
    return Capabilities([SupportedModel(info.name, info.max_context) for info in infos])


@get("/healthz")
async def healthz(services: ServicesDep) -> Response[Health | Problem]:
    """200 once every base model is loaded, 503 until then; needs no key."""
    ready = await services.work(services.ready_bases)
    missing = [name for name in services.bases if name not in ready]
    if not missing:
        return Response(Health())
    detail = f"still being loaded: {', '.join(missing)}"
    problem = Problem(detail=detail, code=CapacityError.code, category=CapacityError.category)
    return Response(problem, status_code=503)
