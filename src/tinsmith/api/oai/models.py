"""The models a key can ask: the served bases and the tenant's checkpoints for sampling."""

from __future__ import annotations

from typing import Literal

from litestar import get
from litestar.params import FromPath
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.paging import Limit, Offset
from tinsmith.api.services import Services, ServicesDep
from tinsmith.api.texts.models import find_model
from tinsmith.store.rows import Principal
from tinsmith.types import CheckpointKind
from tinsmith.wire.paths import SCHEME

PAGE = 1000
OURS = "tinsmith"
OTHERS = "another tenant"  # whose name is not told


class ModelCard(Struct):
    """created: unix seconds; 0 for a base model. owned_by: who made it."""

    id: str
    created: int
    owned_by: str
    object: str = "model"


class ModelList(Struct, omit_defaults=True):
    """next_offset: there are more checkpoints; ask with it as `offset`."""

    data: list[ModelCard]
    object: Literal["list"]
    next_offset: int | None = None


@get("/models")
async def list_models(request: Call, services: ServicesDep, limit: Limit = PAGE, offset: Offset = 0) -> ModelList:
    """The served base models, then the newest checkpoints for sampling, at most `limit`, from `offset` on."""
    return await services.work(_page, services, request.user, limit, offset)


@get("/models/{model:path}")
async def get_model(request: Call, services: ServicesDep, model: FromPath[str]) -> ModelCard:
    """One model, by its name or tinker:// path, slashes escaped or not."""
    name = model.lstrip("/")
    if name.startswith("tinker:/") and not name.startswith(SCHEME):
        name = SCHEME + name.removeprefix("tinker:/")  # the router joins doubled slashes
    found = await services.work(find_model, services, request.user, name)
    owner = OURS if found.path is None else request.user.tenant_name if found.is_own else OTHERS
    return ModelCard(id=found.name, created=int(found.created_at), owned_by=owner)


def _page(services: Services, principal: Principal, limit: int, offset: int) -> ModelList:
    bases = [] if offset else [ModelCard(id=name, created=0, owned_by=OURS) for name in services.bases]
    rows, total = services.store.checkpoints.list(principal.tenant_id, limit, offset, (CheckpointKind.SAMPLER,))
    cards = [
        ModelCard(id=row.path, created=int(row.created_at), owned_by=principal.tenant_name)
        for row in rows
        if row.spec.base_model in services.bases
    ]
    after = offset + limit
    return ModelList([*bases, *cards], "list", after if after < total else None)
