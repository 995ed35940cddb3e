"""What each closed route asks of a key's scope: one table, by the name of the route's handler.

A route that isn't in it has no place in the app: `build_app` refuses to make one, and a test walks both.
"""

from __future__ import annotations

from collections.abc import Mapping

from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers import BaseRouteHandler

from tinsmith.errors import ForbiddenError
from tinsmith.scopes import Scope
from tinsmith.store.rows import Principal

NEEDS: Mapping[str, Scope] = {
    # a client's presence, and what the key is
    "client_config": Scope.READ,
    "dynamic_config": Scope.READ,
    "telemetry": Scope.READ,
    "create_session": Scope.READ,
    "session_heartbeat": Scope.READ,
    "finish_session": Scope.READ,
    "exchange_token": Scope.READ,
    "get_own_key": Scope.READ,
    "delete_own_key": Scope.READ,
    "get_server_capabilities": Scope.READ,
    # what the tenant has and did
    "list_sessions": Scope.READ,
    "get_session": Scope.READ,
    "search_sessions": Scope.READ,
    "export_trace": Scope.READ,
    "get_audit": Scope.READ,
    "get_usage": Scope.READ,
    "get_storage": Scope.READ,
    "get_info": Scope.READ,
    "weights_info": Scope.READ,
    "get_sampler": Scope.READ,
    "retrieve_future": Scope.READ,
    "retrieve_futures": Scope.READ,
    "list_runs": Scope.READ,
    "get_run": Scope.READ,
    "list_run_checkpoints": Scope.READ,
    "list_checkpoints": Scope.READ,
    "list_models": Scope.READ,
    "get_model": Scope.READ,
    # sampling
    "create_sampling_session": Scope.SAMPLE,
    "asample": Scope.SAMPLE,
    "join_sampling_session": Scope.SAMPLE,
    "cancel_future": Scope.SAMPLE,
    "create_chat_completion": Scope.SAMPLE,
    "create_completion": Scope.SAMPLE,
    "create_message": Scope.SAMPLE,
    "count_message_tokens": Scope.SAMPLE,
    # training, and all that changes, shares, hands out or destroys
    "create_model": Scope.FULL,
    "forward_backward": Scope.FULL,
    "optim_step": Scope.FULL,
    "create_custom_loss": Scope.FULL,
    "save_weights": Scope.FULL,
    "save_weights_for_sampler": Scope.FULL,
    "save_weights_external": Scope.FULL,
    "load_weights": Scope.FULL,
    "assign_project": Scope.FULL,
    "delete_checkpoint": Scope.FULL,
    "delete_run": Scope.FULL,
    "set_checkpoint_ttl": Scope.FULL,
    "publish": Scope.FULL,
    "unpublish": Scope.FULL,
    "create_access_token": Scope.FULL,
    "copy_weights": Scope.FULL,
    "import_weights": Scope.FULL,
    "archive": Scope.FULL,
    "external_weights_urls": Scope.FULL,
    # keys
    "create_key": Scope.ADMIN,
    "list_keys": Scope.ADMIN,
    "rotate_key": Scope.ADMIN,
    "revoke_key": Scope.ADMIN,
    # the tenants, and how the server does
    "list_quotas": Scope.ADMIN,
    "set_quotas": Scope.ADMIN,
    "list_weights": Scope.ADMIN,
    "set_weight": Scope.ADMIN,
    "latest_runs": Scope.ADMIN,
    "get_metrics": Scope.ADMIN,
}


def scope_guard(connection: ASGIConnection[BaseRouteHandler, Principal, str, State], handler: BaseRouteHandler) -> None:
    """Runs after the key guard.

    Raises:
        ForbiddenError: the key's scope doesn't reach as far as this route.
    """
    needed, scope = NEEDS[handler.fn.__name__], connection.user.scope
    if not scope.allows(needed):
        what = "an admin key" if needed is Scope.ADMIN else f"a key of scope {needed}"
        raise ForbiddenError(f"this needs {what}, and this key's scope is {scope}")
