"""What a client asks for before anything else: its flags; and its telemetry, which is taken and thrown away."""

from __future__ import annotations

from litestar import post
from litestar.params import JSONBody
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.body import read_body
from tinsmith.api.services import ServicesDep
from tinsmith.wire.requests import ClientConfig

TELEMETRY_BYTES = 8 << 20  # 100 events, some with tracebacks


class ClientFlags(Struct):
    """Only flags that differ from the client's own defaults, or that this server depends on."""

    pjwt_auth_enabled: bool
    proto_compress_fwdbwd: bool
    fwdbwd_max_chunk_len: int
    fwdbwd_max_chunk_bytes_count: int
    parallel_fwdbwd_chunks: bool = True
    sample_use_retrieve_futures: bool = False
    sample_join_sampling_session: bool = False
    custom_loss_server_side: bool = False
    create_model_via_load_weights: bool = True


class DynamicFlags(Struct):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False
    sample_cancel_max_batch_size: int = 64


class Accepted(Struct):
    status: str = "accepted"


@post("/client/config", status_code=200)
async def client_config(request: Call, services: ServicesDep, data: JSONBody[ClientConfig]) -> ClientFlags:
    """The server's side of the negotiation; clients know every flag's default."""
    settings = services.settings
    return ClientFlags(
        pjwt_auth_enabled=settings.jwt_auth,
        proto_compress_fwdbwd=settings.compress_requests,
        fwdbwd_max_chunk_len=settings.chunk_max_datums,
        fwdbwd_max_chunk_bytes_count=settings.chunk_max_bytes,
        custom_loss_server_side=settings.custom_losses,
    )


@post("/client/dynamic_config", status_code=200)
async def dynamic_config(request: Call, data: JSONBody[ClientConfig]) -> DynamicFlags:
    """Flags that clients ask for again from time to time."""
    return DynamicFlags()


@post("/telemetry", status_code=200, request_max_body_size=None)
async def telemetry(request: Call, services: ServicesDep) -> Accepted:
    """Read and forgotten: it may hold tracebacks and headers of users."""
    await read_body(request, services, TELEMETRY_BYTES)
    return Accepted()
