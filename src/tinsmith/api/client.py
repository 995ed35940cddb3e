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
    sample_use_retrieve_futures: bool
    sample_join_sampling_session: bool
    use_pyqwest_transport: bool
    parallel_fwdbwd_chunks: bool = True
    custom_loss_server_side: bool = False
    create_model_via_load_weights: bool = True


class DynamicFlags(Struct):
    sample_cancel_enabled: bool
    refresh_interval_sec: int = 300
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
        sample_use_retrieve_futures=settings.retrieve_futures,
        sample_join_sampling_session=settings.join_sampling_session,
        use_pyqwest_transport=settings.rust_transport,
    )


@post("/client/dynamic_config", status_code=200)
async def dynamic_config(request: Call, services: ServicesDep, data: JSONBody[ClientConfig]) -> DynamicFlags:
    """Flags that clients ask for again from time to time."""
    return DynamicFlags(sample_cancel_enabled=services.settings.cancel_future)


@post("/telemetry", status_code=200, request_max_body_size=None)
async def telemetry(request: Call, services: ServicesDep) -> Accepted:
    """Read and forgotten: it may hold tracebacks and headers of users."""
    await read_body(request, services, TELEMETRY_BYTES)
    return Accepted()
