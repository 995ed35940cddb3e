"""The models a key can ask: the served bases and the tenant's checkpoints for sampling."""

from __future__ import annotations

from litestar import get
from litestar.params import FromPath
from msgspec import Struct

from tinsmith.api.auth import Call
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


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


@get("/models")
async def list_models(request: Call, services: ServicesDep) -> ModelList:
    """The served base models, then the checkpoints for sampling, newest first."""
    return ModelList(await services.work(_cards, services, request.user))


@get("/models/{model:path}")
async def get_model(request: Call, services: ServicesDep, model: FromPath[str]) -> ModelCard:
    """One model, by its name or tinker:// path, slashes escaped or not."""
    name = model.lstrip("/")
    if name.startswith("tinker:/") and not name.startswith(SCHEME):
        name = SCHEME + name.removeprefix("tinker:/")  # the router joins doubled slashes
    found = await services.work(find_model, services, request.user, name)
    owner = OURS if found.path is None else request.user.tenant_name if found.is_own else OTHERS
    return ModelCard(id=found.name, created=int(found.created_at), owned_by=owner)


def _cards(services: Services, principal: Principal) -> list[ModelCard]:
    cards = [ModelCard(id=name, created=0, owned_by=OURS) for name in services.bases]
    offset, total = 0, 1
    while offset < total:
        rows, total = services.store.checkpoints.list(principal.tenant_id, PAGE, offset, (CheckpointKind.SAMPLER,))
        cards += [
            ModelCard(id=row.path, created=int(row.created_at), owned_by=principal.tenant_name)
            for row in rows
            if row.spec.base_model in services.bases
        ]
        offset += PAGE
    return cards
