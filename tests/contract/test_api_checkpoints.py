"""Checkpoints on the wire: links and what breaks them, ranges, publishing, copies, lifetimes."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import os
import tarfile
import time
from collections.abc import Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from litestar.testing import TestClient
from safetensors.numpy import load

from tests.contract.conftest import BASE, Api, House, small_state
from tests.service import until
from tinsmith.api.app import build_app
from tinsmith.api.main import build_services
from tinsmith.files.blobs import checkpoint_key
from tinsmith.files.checkpoint_file import dump_state
from tinsmith.store.rows import NewCheckpoint
from tinsmith.types import CheckpointKind, RunId, RunSpec
from tinsmith.upkeep.janitor import sweep

KINDS = ("weights", "sampler_weights", "external_weights")
DAY = 24 * 3600.0
JSON = {"accept": "application/json"}


@pytest.fixture
def run_id(api: Any, worker: Any) -> str:
    made = api.create(api.session())
    worker.step()
    return str(made["model_id"])


@pytest.fixture
def seqs() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture
def save(api: Any, worker: Any, run_id: str, seqs: Iterator[int]) -> Any:
    """Save under a name; the place of the checkpoint in the API."""

    def make(name: str = "a", kind: str = "weights", **more: Any) -> str:
        route = {"weights": "/save_weights", "sampler_weights": "/save_weights_for_sampler"}
        path = route.get(kind, "/save_weights_external")
        body = {"model_id": run_id, "seq_id": next(seqs), "path": name, "overwrite": True, **more}
        promise = api.post(path, body)
        worker.step()
        assert api.result(promise)["path"] == f"tinker://{run_id}/{kind}/{name}"
        return f"/training_runs/{run_id}/checkpoints/{kind}/{name}"

    return make


@pytest.fixture
def link(api: Any) -> Any:
    """The signed link to the archive of a checkpoint, without its server."""

    def ask(place: str) -> str:
        url = api.get(f"{place}/archive", headers=JSON)["url"]
        return str(url[url.index("/api/") :])

    return ask


def changed(link: str, **query: str) -> str:
    path, _, text = link.partition("?")
    return f"{path}?{urlencode({**{k: v[0] for k, v in parse_qs(text).items()}, **query})}"


def path_of(place: str) -> str:
    _, _, run_id, _, kind, name = place.split("/")
    return f"tinker://{run_id}/{kind}/{name}"


class TestArchive:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_a_tar_of_an_adapter(self, save: Any, link: Any, anonymous: Any, kind: str, run_id: str) -> None:
        answer = anonymous.raw("GET", link(save(kind=kind)))
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-tar"
        assert int(answer.headers["content-length"]) == len(answer.content)
        with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        config = json.loads(files["adapter_config.json"])
        assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 32, ["q_proj"])
        assert config["base_model_name_or_path"] == BASE
        expected = small_state(RunSpec(run_id, BASE, 4)).tensors
        weights = load(files["adapter_model.safetensors"])
        assert set(weights) == {
            f"base_model.model.model.layers.0.self_attn.q_proj.{half}.weight" for half in ("lora_A", "lora_B")
        }
        for name, tensor in weights.items():
            short = name.removeprefix("base_model.model.").removesuffix(".weight")
            assert tensor.tobytes() == expected[f"param/{short}"].tobytes()

    def test_redirects_those_who_do_not_ask_for_json(self, save: Any, api: Any) -> None:
        answer = api.raw("GET", f"/api/v1{save()}/archive", follow_redirects=False)
        assert answer.status_code == 302
        assert answer.headers["location"].startswith("http://testserver.local/api/v1/downloads/")
        assert 3500 < parsedate_to_datetime(answer.headers["expires"]).timestamp() - time.time() <= 3600

    def test_links_name_the_public_url(self, make_house: Any) -> None:
        """Behind a proxy the server can't know its own address."""
        house = make_house(public_url="https://tinker.example/pre/")
        with TestClient(build_app(house.services)) as client:
            api = Api(client, house.key)
            run = api.create(api.session())
            put(house, run["model_id"], house.make_worker())
            url = api.get(f"/training_runs/{run['model_id']}/checkpoints/weights/big/archive", headers=JSON)["url"]
        assert url.startswith("https://tinker.example/pre/api/v1/downloads/")

    def test_external_links_are_for_external_checkpoints(self, save: Any, api: Any) -> None:
        problem = api.get(f"{save()}/external_weights_urls", 400)
        assert "save_weights_external" in problem["detail"]

    def test_another_kind_of_checkpoint_is_none(self, api: Any, run_id: str) -> None:
        problem = api.get(f"/training_runs/{run_id}/checkpoints/what/a/archive", 400)
        assert "external_weights/<name>" in problem["detail"]


class TestLinks:
    def test_need_no_key_and_the_route_to_them_does(self, save: Any, link: Any, anonymous: Any, other: Any) -> None:
        place = save()
        anonymous.get(f"{place}/archive", 401)
        assert other.get(f"{place}/archive", 404)["code"] == "not_found"
        assert anonymous.raw("GET", link(place)).status_code == 200

    @pytest.mark.parametrize("field", ["expires", "key", "version", "signature"])
    def test_changed_are_refused(self, save: Any, link: Any, anonymous: Any, field: str) -> None:
        good = link(save())
        value = parse_qs(urlsplit(good).query)[field][0]
        for wrong in (value[:-1] + ("1" if value[-1] != "1" else "2"), "9" + value, value.upper() + "0", "0"):
            answer = anonymous.raw("GET", changed(good, **{field: wrong}))
            assert answer.status_code == 403, answer.text
            assert answer.json()["code"] == "forbidden"
        assert anonymous.raw("GET", changed(good, signature="\u00e9")).status_code == 403
        assert anonymous.raw("GET", changed(good, expires="soon")).status_code == 404
        assert anonymous.raw("GET", good.partition("?")[0]).status_code == 404

    def test_are_for_one_file(self, save: Any, link: Any, anonymous: Any) -> None:
        save("b")
        good = link(save("a", "external_weights"))
        for wrong in (
            good.replace("/a/archive.tar", "/b/archive.tar"),
            good.replace("/external_weights/", "/weights/"),
            good.replace("archive.tar", "adapter_config.json"),
            good.replace(":train:0", ":train:1"),
        ):
            assert anonymous.raw("GET", wrong).status_code == 403

    def test_expire(self, save: Any, api: Any, anonymous: Any, make_house: Any, house: House) -> None:
        place = save()
        object.__setattr__(house.settings, "download_ttl_s", 0.0)
        url = api.get(f"{place}/archive", headers=JSON)["url"]
        answer = anonymous.raw("GET", url)
        assert (answer.status_code, answer.json()["code"]) == (410, "gone")
        later = changed(url, expires=str(int(time.time()) + 100))
        assert anonymous.raw("GET", later).status_code == 403

    def test_end_with_the_checkpoint(self, save: Any, link: Any, anonymous: Any, api: Any) -> None:
        first, second, third = (link(save(name)) for name in ("first", "second", "third"))
        api.call("DELETE", save("first"), 204)
        assert anonymous.raw("GET", first).status_code == 404
        place = save("second")
        again = anonymous.raw("GET", second)
        assert (again.status_code, again.json()["code"]) == (410, "gone")
        assert anonymous.raw("GET", link(place)).status_code == 200
        assert anonymous.raw("GET", third).status_code == 200

    def test_end_with_the_key(self, save: Any, api: Any, anonymous: Any, house: House) -> None:
        key, secret = house.store.tenants.create_key(house.tenant_id, "short-lived")
        url = api.get(f"{save()}/archive", headers={**JSON, "X-API-Key": secret})["url"]
        assert house.tenant_id not in url
        assert anonymous.raw("GET", url).status_code == 200
        house.store.tenants.revoke_key(key.key_id)
        answer = anonymous.raw("GET", url)
        assert (answer.status_code, answer.json()["code"]) == (410, "gone")

    def test_outlive_the_process(self, save: Any, link: Any, house: House) -> None:
        url = link(save())
        services = build_services(house.settings, house.store, None, {})
        with TestClient(build_app(services)) as client:
            assert client.get(url).status_code == 200
        services.close()

    def test_are_not_logged(self, save: Any, link: Any, anonymous: Any, capsys: Any, caplog: Any) -> None:
        url = changed(link(save()), expires="1")
        anonymous.raw("GET", url)
        signature = parse_qs(urlsplit(url).query)["signature"][0]
        out = capsys.readouterr()
        assert signature not in out.out + out.err + caplog.text


class TestRanges:
    @pytest.mark.parametrize("kind", KINDS)
    def test_any_range_is_that_part_of_the_whole(self, save: Any, link: Any, anonymous: Any, kind: str) -> None:
        url = link(save(kind=kind))
        whole = anonymous.raw("GET", url).content
        size = len(whole)
        edges = sorted({0, 1, 511, 512, 513, 700, 1024, 1500, 2047, size // 2, size - 1025, size - 1})
        for start, stop in itertools.combinations(edges, 2):
            part = anonymous.raw("GET", url, headers={"Range": f"bytes={start}-{stop - 1}"})
            assert part.status_code == 206
            assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
            assert int(part.headers["content-length"]) == stop - start
            assert part.content == whole[start:stop]

    def test_open_and_last_ranges(self, save: Any, link: Any, anonymous: Any) -> None:
        url = link(save())
        whole = anonymous.raw("GET", url).content
        for text, expected in (
            ("bytes=1000-", whole[1000:]),
            ("bytes=-10", whole[-10:]),
            (f"bytes=-{10**9}", whole),
            (f"bytes=5-{10**9}", whole[5:]),
        ):
            part = anonymous.raw("GET", url, headers={"Range": text})
            assert (part.status_code, part.content) == (206, expected), text

    @pytest.mark.parametrize("text", ["bytes=-", "bytes=9-3", "bytes=0-1,5-6", "lines=1-2", "bytes=a-b", "junk"])
    def test_what_is_no_range_gets_the_whole(self, save: Any, link: Any, anonymous: Any, text: str) -> None:
        answer = anonymous.raw("GET", link(save()), headers={"Range": text})
        assert answer.status_code == 200
        assert len(answer.content) == int(answer.headers["content-length"])

    @pytest.mark.parametrize("text", ["bytes=999999999-", "bytes=-0"])
    def test_a_range_past_the_end(self, save: Any, link: Any, anonymous: Any, text: str) -> None:
        url = link(save())
        size = anonymous.raw("HEAD", url).headers["content-length"]
        answer = anonymous.raw("GET", url, headers={"Range": text})
        assert answer.status_code == 416
        assert answer.headers["content-range"] == f"bytes */{size}"
        assert answer.json()["code"] == "invalid_request"

    def test_a_part_of_another_version_is_the_whole(self, save: Any, link: Any, anonymous: Any) -> None:
        url = link(save())
        head = anonymous.raw("HEAD", url)
        assert head.content == b""
        assert head.headers["accept-ranges"] == "bytes"
        size = int(head.headers["content-length"])
        for tag, status in ((head.headers["etag"], 206), ('"another"', 200)):
            answer = anonymous.raw("GET", url, headers={"Range": "bytes=7-", "If-Range": tag})
            assert (answer.status_code, len(answer.content)) == (status, size - (7 if status == 206 else 0))


def put(house: House, run_id: str, worker: Any, num_bytes: int = 1000) -> str:
    """A checkpoint named `big` of about that size; its place in the API."""
    worker.step()
    state = small_state(RunSpec(run_id, BASE, 4), width=num_bytes // 32)
    info = house.blobs.put(checkpoint_key(house.tenant_id), dump_state(state))
    new = NewCheckpoint(run_id, CheckpointKind.TRAINING, "big", info.key, info.size, info.sha256)
    house.store.checkpoints.put(house.tenant_id, new, time.time())
    return f"/training_runs/{run_id}/checkpoints/weights/big"


def test_a_download_that_has_begun_outlives_the_checkpoint(
    house: House, api: Any, run_id: str, worker: Any, link: Any, live: Any
) -> None:
    place = put(house, run_id, worker, 64 * 2**20)
    url = link(place)
    blob = house.store.checkpoints.get_any(run_id, CheckpointKind.TRAINING, "big").blob
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=20)
    connection.request("GET", url)
    answer = connection.getresponse()
    size = int(answer.headers["content-length"])
    assert size > 32 * 2**20
    received = len(answer.read(100_000))
    api.call("DELETE", place, 204)
    sweep(house.store, house.blobs, house.settings, time.time() + DAY)
    assert not house.blobs.exists(blob)
    received += len(answer.read())
    assert received == size
    connection.request("GET", url, headers={"Range": "bytes=100000-"})
    assert connection.getresponse().status == 404
    connection.close()


def test_downloads_that_are_broken_off_leave_no_file_open(
    house: House, run_id: str, worker: Any, link: Any, live: Any
) -> None:
    url = link(put(house, run_id, worker, 64 * 2**20))
    blobs = str(house.settings.data_dir / "blobs")

    def num_open() -> int:
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd)]
        return sum(name.startswith(blobs) for name in names)

    def is_open(fd: str) -> bool:
        return Path(f"/proc/self/fd/{fd}").is_symlink()

    for method in ("GET", "GET", "HEAD", "GET"):
        connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=20)
        connection.request(method, url)
        connection.getresponse().read(100)
        connection.close()
    until(lambda: num_open() == 0, 10, lambda: f"{num_open()} files are open")


class TestPublishing:
    def test_is_idempotent_and_shown(self, save: Any, api: Any, run_id: str) -> None:
        place = save()
        listing = f"/training_runs/{run_id}/checkpoints"
        assert "public" not in api.get(listing)["checkpoints"][0]
        for _ in range(2):
            api.call("POST", f"{place}/publish", 204)
            assert api.get(listing)["checkpoints"][0]["public"] is True
        for _ in range(2):
            api.call("DELETE", f"{place}/publish", 204)
            assert "public" not in api.get(listing)["checkpoints"][0]

    def test_what_takes_a_public_name_is_private(self, save: Any, api: Any, other: Any) -> None:
        place = save()
        api.call("POST", f"{place}/publish", 204)
        other.post("/weights_info", {"tinker_path": path_of(place)})
        save()
        other.post("/weights_info", {"tinker_path": path_of(place)}, 404)

    def test_files_stay_the_owners(self, save: Any, api: Any, other: Any) -> None:
        for kind in KINDS:
            place = save(kind=kind)
            api.call("POST", f"{place}/publish", 204)
            other.get(f"{place}/archive", 404)
            other.get(f"{place}/external_weights_urls", 404)
            other.post(f"{place}/access_token", status=404)

    def test_a_copy_counts_for_the_key_that_made_it(self, save: Any, api: Any, other: Any) -> None:
        """Also one whose session was made for it."""
        place = save()
        api.call("POST", f"{place}/publish", 204)
        limit = {"tenant": "bob", "key_id": other.get("/auth/apikey/me")["note"], "quotas": {"storage_bytes": 10**9}}
        api.call("PUT", "/admin/quotas", 200, json=limit)
        other.post("/copy_weights", {"source_path": path_of(place), "destination_project_id": "p"})
        whole, key = api.get("/admin/quotas?tenant=bob")["scopes"]
        of_whole, of_key = ({quota["quota"]: quota["used"] for quota in scope["quotas"]} for scope in (whole, key))
        assert of_key["storage_bytes"] == of_whole["storage_bytes"] > 0

    def test_a_token_ends(self, save: Any, api: Any, other: Any) -> None:
        place = save()
        made = api.post(f"{place}/access_token", {"ttl_seconds": 1})
        body = {"source_path": path_of(place), "destination_project_id": "p", "weights_access_token": made["token"]}
        other.post("/copy_weights", body)
        time.sleep(2)
        assert other.post("/copy_weights", body, 404)["code"] == "not_found"
        api.post(f"{place}/access_token", {"ttl_seconds": 10**9}, 400)

    def test_a_token_is_for_what_was_stored_and_ends_with_its_key(
        self, save: Any, api: Any, other: Any, house: House
    ) -> None:
        key, secret = house.store.tenants.create_key(house.tenant_id, "short-lived")
        place = save()
        tokens = [
            api.post(f"{place}/access_token", {}, headers=headers)["token"] for headers in ({}, {"X-API-Key": secret})
        ]
        for token in tokens:
            said = base64.urlsafe_b64decode(token.removeprefix("tmlw-").partition(".")[0] + "==").decode()
            assert house.tenant_id not in token + said

        def ask(token: str, status: int) -> None:
            body = {"source_path": path_of(place), "destination_project_id": "p", "weights_access_token": token}
            other.post("/copy_weights", body, status)

        ask(tokens[0], 200)
        ask(tokens[1], 200)
        ask(save("b") and tokens[0] + "0", 404)
        house.store.tenants.revoke_key(key.key_id)
        ask(tokens[0], 200)
        ask(tokens[1], 404)
        api.call("DELETE", place, 204)
        ask(tokens[0], 404)
        save()
        ask(tokens[0], 404)
        ask(house.key, 200)


class TestNames:
    """`overwrite` of save_state, as the SDK documents it."""

    @pytest.fixture
    def ask(self, api: Any, worker: Any, run_id: str) -> Any:
        def send(seq: int, **more: Any) -> Any:
            promise = api.post("/save_weights", {"model_id": run_id, "seq_id": seq, "path": "a", **more})
            worker.step()
            return api.result(promise)

        return send

    def test_a_taken_one_is_replaced_only_if_asked_for(self, ask: Any, api: Any, run_id: str, house: House) -> None:
        def stored() -> tuple[str, dict[str, str]]:
            row = house.store.checkpoints.get_any(RunId(run_id), CheckpointKind.TRAINING, "a")
            return row.blob, row.user_metadata

        done = ask(1, user_metadata={"x": "1"})
        first, metadata = stored()
        assert metadata == {"x": "1"}
        refusal = ask(2, user_metadata={"y": "2"})
        assert (refusal["category"], refusal["code"]) == ("user", "invalid_request")
        assert "a checkpoint weights/a already: save under another name, or with overwrite=True" in refusal["error"]
        assert stored() == (first, {"x": "1"})
        assert ask(1) == done, "the same request again is the same answer"
        assert ask(2, overwrite=True) == refusal
        assert ask(3, user_metadata={"y": "2"}, overwrite=True) == done
        second, metadata = stored()
        assert (second != first, metadata) == (True, {"y": "2"})
        sweep(house.store, house.blobs, house.settings, time.time() + DAY)
        files = [path for path in (house.settings.data_dir / "blobs").rglob("*") if path.is_file()]
        assert (len(files), house.blobs.exists(second)) == (1, True), "those of the refused and the replaced one go"

    def test_one_that_is_free_again_can_be_taken(self, ask: Any, api: Any, run_id: str) -> None:
        ask(1)
        api.call("DELETE", f"/training_runs/{run_id}/checkpoints/weights/a", 204)
        assert "path" in ask(2, ttl_seconds=1)
        time.sleep(1.05)
        assert "path" in ask(3)

    def test_those_of_samplers_and_exports_are_replaced(self, save: Any) -> None:
        for kind in ("sampler_weights", "external_weights"):
            assert save("a", kind, overwrite=False) == save("a", kind, overwrite=False)


class TestCopies:
    def test_the_same_request_makes_one_copy(self, save: Any, api: Any, other: Any) -> None:
        body = {"source_path": path_of(save()), "destination_project_id": "p"}
        key = {"X-Idempotency-Key": "one"}
        first = api.post("/copy_weights", body, headers=key)
        assert api.post("/copy_weights", body, headers=key) == first
        assert api.post("/copy_weights", body, headers={"X-Idempotency-Key": "two"}) != first
        assert api.post("/copy_weights", body) != api.post("/copy_weights", body)
        changed = {**body, "source_path": path_of(save("b"))}
        assert "X-Idempotency-Key" in api.post("/copy_weights", changed, 400, headers=key)["detail"]

    def test_into_a_place_of_a_session(self, save: Any, api: Any, worker: Any, run_id: str) -> None:
        session = api.session()
        body = {"source_path": path_of(save(kind="sampler_weights")), "session_id": session, "model_seq_id": 3}
        made = api.post("/copy_weights", body)
        assert made == {"tinker_path": f"tinker://{session}:train:3/sampler_weights/a"}
        assert api.post("/copy_weights", body) == made
        worker.step()
        taken = api.create(session, 3)
        assert "can't be trained" in api.result(taken)["error"]
        taken = {**body, "session_id": run_id.partition(":")[0], "model_seq_id": 0}
        assert "model_seq_id 0" in api.post("/copy_weights", taken, 400)["detail"]
        assert api.get(f"/sessions/{session}")["training_run_ids"] == [f"{session}:train:3"]

    @pytest.mark.parametrize(
        "body", [{}, {"session_id": "s"}, {"model_seq_id": 1}, {"destination_project_id": "p", "session_id": "s"}]
    )
    def test_needs_one_destination(self, save: Any, api: Any, body: dict[str, Any]) -> None:
        assert "destination_project_id" in api.post("/copy_weights", {"source_path": "x", **body}, 400)["detail"]

    def test_lies_in_the_project_that_was_named(self, save: Any, api: Any) -> None:
        body = {"source_path": path_of(save()), "destination_project_id": "archive"}
        run = api.post("/copy_weights", body)["tinker_path"].split("/")[2]
        in_project = {
            project: [
                row["training_run_id"]
                for row in api.get("/training_runs", params={"project_id": project})["training_runs"]
            ]
            for project in ("archive", "other")
        }
        assert in_project == {"archive": [run], "other": []}
        (session,) = api.post("/sessions/search", {"project_ids": ["archive"]})["sessions"]
        assert run.startswith(session["session_id"])

    def test_keeps_the_metadata_of_ones_own(self, save: Any, api: Any, other: Any) -> None:
        place = save(user_metadata={"note": "mine"})
        api.call("POST", f"{place}/publish", 204)
        body = {"source_path": path_of(place), "destination_project_id": "p", "ttl_seconds": 50}
        for who, expected in ((api, {"note": "mine"}), (other, {})):
            run_id = who.post("/copy_weights", body)["tinker_path"].split("/")[2]
            (row,) = who.get(f"/training_runs/{run_id}/checkpoints")["checkpoints"]
            assert row["user_metadata"] == expected
            assert row["expires_at"]

    def test_the_file_lives_as_long_as_any_copy(self, save: Any, api: Any, other: Any, house: House) -> None:
        place = save()
        path = path_of(place)
        blob = house.store.checkpoints.get_any(path.split("/")[2], CheckpointKind.TRAINING, "a").blob
        api.call("POST", f"{place}/publish", 204)
        body = {"source_path": path, "destination_project_id": "p"}
        copied = other.post("/copy_weights", body)["tinker_path"].split("/")
        api.call("DELETE", place, 204)
        sweep(house.store, house.blobs, house.settings, time.time() + DAY)
        assert house.blobs.exists(blob)
        other.call("DELETE", f"/training_runs/{copied[2]}/checkpoints/weights/a", 204)
        sweep(house.store, house.blobs, house.settings, time.time() + DAY)
        assert not house.blobs.exists(blob)


class TestLifetime:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_enforced_at_once_and_the_file_goes(
        self, save: Any, api: Any, link: Any, anonymous: Any, house: House, kind: str
    ) -> None:
        place = save(kind=kind, ttl_seconds=3600)
        path = path_of(place)
        url = link(place)
        row = house.store.checkpoints.get_any(path.split("/")[2], CheckpointKind(kind), "a")
        assert 3500 < row.expires_at - time.time() <= 3600
        api.call("PUT", f"{place}/ttl", 204, json={"ttl_seconds": 1})
        time.sleep(1.05)
        api.post("/weights_info", {"tinker_path": path}, 404)
        api.get(f"{place}/archive", 404)
        api.call("PUT", f"{place}/ttl", 404, json={"ttl_seconds": None})
        assert anonymous.raw("GET", url).status_code == 404
        assert api.get("/checkpoints")["checkpoints"] == []
        sweep(house.store, house.blobs, house.settings, time.time())
        sweep(house.store, house.blobs, house.settings, time.time() + DAY)
        assert not house.blobs.exists(row.blob)

    @pytest.mark.parametrize("kind", KINDS)
    def test_begins_when_it_is_written(
        self, api: Any, worker: Any, run_id: str, house: House, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However long it waited in the queue."""
        route = {"weights": "/save_weights", "sampler_weights": "/save_weights_for_sampler"}
        body = {"model_id": run_id, "seq_id": 1, "path": "a", "ttl_seconds": 60}
        promise = api.post(route.get(kind, "/save_weights_external"), body)
        later = time.time() + 1000
        with monkeypatch.context() as patched:
            patched.setattr("time.time", lambda: later)
            worker.step()
        assert api.result(promise)["path"].endswith(f"{kind}/a")
        row = house.store.checkpoints.get_any(RunId(run_id), CheckpointKind(kind), "a", now=later)
        assert row.expires_at == later + 60
        (listed,) = api.get(f"/training_runs/{run_id}/checkpoints")["checkpoints"]
        assert datetime.fromisoformat(listed["expires_at"]).timestamp() == pytest.approx(later + 60, abs=1e-3)

    def test_has_a_range(self, make_house: Any) -> None:
        house = make_house(min_ttl_s=3600)
        with TestClient(build_app(house.services)) as client:
            api = Api(client, house.key)
            run = api.create(api.session())["model_id"]
            worker = house.make_worker()
            worker.step()
            copy = {"source_path": f"tinker://{run}/weights/a", "destination_project_id": "p", "ttl_seconds": 3599}
            assert "3600.." in api.post("/copy_weights", copy, 400)["detail"]
            place = f"/training_runs/{run}/checkpoints/weights/a"
            assert "3600.." in api.call("PUT", f"{place}/ttl", 400, json={"ttl_seconds": 3599})["detail"]
            for seq, route in enumerate(("/save_weights", "/save_weights_for_sampler", "/save_weights_external"), 1):
                promise = api.post(route, {"model_id": run, "seq_id": seq, "path": "a", "ttl_seconds": 3599})
                assert "3600.." in api.result(promise)["error"]

    def test_changes_at_any_time(self, save: Any, api: Any, house: House) -> None:
        place = save(ttl_seconds=2)
        api.call("PUT", f"{place}/ttl", 204, json={"ttl_seconds": None})
        sweep(house.store, house.blobs, house.settings, time.time() + DAY)
        api.post("/weights_info", {"tinker_path": path_of(place)})


def test_old_clients_are_spared_kinds_they_do_not_know(save: Any, api: Any, run_id: str) -> None:
    save("a")
    save("b", "external_weights")
    for path in ("/checkpoints", f"/training_runs/{run_id}/checkpoints"):
        for version, kinds in (("0.25.0", ["weights"]), ("0.28.0", ["external_weights", "weights"]), ("x", None)):
            rows = api.get(path, headers={"x-stainless-package-version": version})["checkpoints"]
            found = sorted(row["checkpoint_id"].split("/")[0] for row in rows)
            assert found == (kinds or ["external_weights", "weights"])


def test_a_malformed_key_fails_the_export_alone(api: Any, worker: Any, run_id: str) -> None:
    """The library panics at a number without bytes."""
    number = b"".join(len(field).to_bytes(4) + field for field in (b"ssh-rsa", b"\1\0\1", b""))
    keys = [f"ssh-rsa {base64.b64encode(number).decode()}"]
    body = {"model_id": run_id, "seq_id": 1, "path": "a", "age_encryption_recipients": keys}
    answer = api.result(api.post("/save_weights_external", body))
    assert (answer["category"], "is no public key" in answer["error"]) == ("user", True)
    promise = api.post("/save_weights_external", {"model_id": run_id, "seq_id": 2, "path": "a"})
    worker.step()
    assert api.result(promise)["path"].endswith("/a")


def test_pages_of_old_clients_count_what_they_are_shown(save: Any, api: Any) -> None:
    for name in ("a", "b", "c"):
        save(name)
        save(name, "external_weights")
        save(name, "external_weights")
    headers = {"x-stainless-package-version": "0.25.0"}
    pages = [api.get("/checkpoints", headers=headers, params={"limit": 2, "offset": at}) for at in (0, 2, 4)]
    names = [[row["checkpoint_id"] for row in page["checkpoints"]] for page in pages]
    assert names == [["weights/c", "weights/b"], ["weights/a"], []]
    assert {page["cursor"]["total_count"] for page in pages} == {3}
    assert api.get("/checkpoints", params={"limit": 2})["cursor"]["total_count"] == 6
