"""The API reference page: Swagger UI over our OpenAPI document, all of it served from here.

A browser that opens it talks to nobody else, so it works without internet and tells no one.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from litestar import Request, Response, get
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.params import FromPath

from tinsmith import __version__
from tinsmith.api.document import DocumentConfig
from tinsmith.errors import NotFoundError

PATH = "/schema"
NEEDS_KEY = [{"key": list[str]()}, {"bearer": list[str]()}]  # either
ASSETS = "/schema/assets"
FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui-standalone-preset.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tinsmith</title>
<link rel="icon" href="{ASSETS}/favicon-32x32.png">
<link rel="stylesheet" href="{ASSETS}/swagger-ui.css">
</head>
<body>
<div id="swagger-container"></div>
<script src="{ASSETS}/swagger-ui-bundle.js"></script>
<script src="{ASSETS}/swagger-ui-standalone-preset.js"></script>
<script src="{ASSETS}/start.js"></script>
</body>
</html>
""".encode()
START = f"""SwaggerUIBundle({{
  url: "{PATH}/openapi.json",
  dom_id: "#swagger-container",
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset],
}});
"""


@get(f"{ASSETS}/{{name:str}}", include_in_schema=False, sync_to_thread=False)
def asset(name: FromPath[str]) -> Response[bytes]:
    """One of Swagger UI's own files."""
    if name not in FILES:
        raise NotFoundError("no such file")
    return Response(_content(name), media_type=FILES[name], headers={"cache-control": "max-age=86400"})


@cache
def _content(name: str) -> bytes:
    """Kept: no key is needed to ask for it, and an answer that isn't read holds no file open."""
    return (resources.files("swagger_ui") / "static" / name).read_bytes()


@get(f"{ASSETS}/start.js", include_in_schema=False, media_type="text/javascript", sync_to_thread=False)
def start() -> str:
    """A file, and no part of the page, so that the page may forbid scripts within."""
    return START


class Page(OpenAPIRenderPlugin):
    def __init__(self) -> None:
        super().__init__(path="/swagger")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return PAGE


def openapi_config() -> DocumentConfig:
    schemes = {
        "key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
        "bearer": SecurityScheme(type="http", scheme="bearer"),
    }
    return DocumentConfig(
        title="tinsmith",
        version=__version__,
        path=PATH,
        render_plugins=[Page()],
        components=Components(security_schemes=dict(schemes)),
    )
