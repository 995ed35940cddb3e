"""The API reference page: Swagger UI over our OpenAPI document, all of it served from here.

A browser that opens it talks to nobody else, so it works without internet and tells no one.
"""

from __future__ import annotations

from importlib import resources

from litestar import get
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.params import FromPath
from litestar.response import File

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


@get(f"{ASSETS}/{{name:str}}", include_in_schema=False, sync_to_thread=False)
def asset(name: FromPath[str]) -> File:
    """One of Swagger UI's own files."""
    if name not in FILES:
        raise NotFoundError("no such file")
    path = str(resources.files("swagger_ui") / "static" / name)
    return File(
        path, media_type=FILES[name], content_disposition_type="inline", headers={"cache-control": "max-age=86400"}
    )


def openapi_config() -> DocumentConfig:
    page = SwaggerRenderPlugin(
        js_url=f"{ASSETS}/swagger-ui-bundle.js",
        css_url=f"{ASSETS}/swagger-ui.css",
        standalone_preset_js_url=f"{ASSETS}/swagger-ui-standalone-preset.js",
        favicon=f'<link rel="icon" href="{ASSETS}/favicon-32x32.png">',
    )
    schemes = {
        "key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
        "bearer": SecurityScheme(type="http", scheme="bearer"),
    }
    return DocumentConfig(
        title="tinsmith",
        version=__version__,
        path=PATH,
        render_plugins=[page],
        components=Components(security_schemes=dict(schemes)),
    )
