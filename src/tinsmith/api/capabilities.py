"""What is served, and whether it is up."""

from __future__ import annotations

from litestar import Response, get
from litestar.params import FromQuery
from msgspec import UNSET, Struct, UnsetType

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
    """warnings: what is wrong though everything is served; absent if nothing is."""

    status: str = "ok"
    warnings: list[str] | UnsetType = UNSET


@get("/get_server_capabilities")
async def get_server_capabilities(request: Call, services: ServicesDep) -> Capabilities:
    infos = [base.info for base in services.bases.values()]
    return Capabilities([SupportedModel(info.name, info.max_context) for info in infos])


@get("/healthz")
async def healthz(services: ServicesDep, supervised: FromQuery[bool] = False) -> Response[Health | Problem]:
    """200 once every base model is loaded, 503 until then; needs no key. A supervisor that gives no sign of life stands
    among the warnings; with `supervised`, for a check that starts the whole server again, the answer is 503 then."""
    ready = await services.work(services.ready_bases)
    missing = [name for name in services.bases if name not in ready]
    trouble = services.supervisor.trouble
    if not missing and (trouble is None or not supervised):
        return Response(Health(warnings=UNSET if trouble is None else [trouble]))
    loading = [f"still being loaded: {', '.join(missing)}"] if missing else []
    detail = "; ".join([*loading, *([] if trouble is None else [trouble])])
    problem = Problem(detail=detail, code=CapacityError.code, category=CapacityError.category)
    return Response(problem, status_code=503)
