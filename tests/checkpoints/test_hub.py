"""Models by name: the real client, its cache, and a small server that answers as the hub does."""

import hashlib
import http.server
import json
import threading
from contextlib import contextmanager

import huggingface_hub.constants as constants
import pytest
from toys import assert_same_tensors, manual_plan, one_thread, toy  # noqa: F401

import sinkprune as sp
from sinkprune.checkpoints import hub
from sinkprune.commands.main import main

COMMIT = "ab" * 20


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's listing of a repository and its files, for any folder of ``server.models``."""

    def log_message(self, *words):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        folder = self.server.models.get("/".join(path[:2]))
        if folder is None:
            return self.answer(b"{}", 401, X_Error_Code="RepoNotFound")
        if path[2] in ("revision", "tree") or len(path) == 2:
            if len(path) > 3 and path[3] not in ("main", "v1", COMMIT):
                return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = [p.relative_to(folder).as_posix() for p in files]
            if path[2:3] == ["tree"]:
                listing = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": digest(p)[:40]}
                    for n, p in zip(names, files, strict=True)
                ]
            else:
                listing = {
                    "id": "/".join(path[:2]), "sha": COMMIT, "private": False, "gated": False,
                    "siblings": [{"rfilename": n} for n in names],
                }  # fmt: skip
            return self.answer(json.dumps(listing).encode(), Content_Type="application/json")
        file = folder.joinpath(*path[4:])
        return self.answer(file.read_bytes(), ETag=f'"{digest(file)[:40]}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


def point_at(patch, port):
    endpoint = f"http://127.0.0.1:{port}"
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


@contextmanager
def serving(monkeypatch, **models):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.models, server.asked = {name.replace("__", "/"): folder for name, folder in models.items()}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with monkeypatch.context() as patch:
        point_at(patch, server.server_port)
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(tmp_path):
    """A pruned model as someone would upload it, beside files that must never be fetched."""
    model = sp.apply(toy(), manual_plan(toy(), [[0, 1], [2], [0, 1, 3]]))
    folder = sp.save(model, tmp_path / "published")
    for name in ("modeling_evil.py", "pytorch_model.bin", "training_args.pt"):
        (folder / name).write_text("raise SystemExit('never')")
    (folder / "original").mkdir()
    (folder / "original/model.safetensors").write_bytes(b"another")
    return model, folder


def test_weights_and_json_are_fetched_and_nothing_else(published, cache, monkeypatch):
    model, folder = published
    with serving(monkeypatch, org__name=folder) as server:
        back, _ = sp.load("org/name", revision="v1")
    assert_same_tensors(back.state_dict(), model.state_dict())
    assert back.prune_plan == model.prune_plan
    fetched = {path.name for path in cache.rglob("snapshots/*/*")}
    assert fetched == {"config.json", "model.safetensors", "sinkprune.json"}
    assert not [path for path in server.asked if "evil" in path or ".bin" in path or "original" in path]
    assert any("/revision/v1" in path for path in server.asked)


def test_what_was_fetched_once_loads_without_a_network_and_its_name_is_kept(
    published, cache, tmp_path, monkeypatch, capsys
):
    with serving(monkeypatch, org__name=published[1]):
        sp.load("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, _ = sp.load("org/name@main")
    assert_same_tensors(model.state_dict(), published[0].state_dict())
    folder = sp.export(model, tmp_path / "m", to="transformers")
    assert json.loads((folder / "sinkprune_export.json").read_text())["source"] == f"org/name@{COMMIT[:12]}"
    assert main(["doctor", "org/name"]) == 0
    assert "llada" in capsys.readouterr().out


def test_what_is_not_there_is_said_in_one_line(published, cache, monkeypatch, capsys):
    (published[1] / "config.json").unlink()
    with serving(monkeypatch, org__name=published[1]):
        for source, words in (
            ("org/unknown", "org/unknown: no such local folder; the hub has no such model"),
            ("org/name@v9", "org/name at v9: no such local folder; the hub has the model, but no such rev"),
            ("org/name", "on the hub it has no config.json"),
            ("-org/name", "expected 'tiny', 'small', a local folder with config.json, or org/name"),
            ("org/na..me", "no name that a model on the hub can have"),
        ):
            with pytest.raises(FileNotFoundError) as error:
                sp.load(source)
            assert words in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capsys.readouterr()
    assert main(["plan", "org/other", "--out", "plan.json"]) == 2
    told = capsys.readouterr().err
    assert "HF_HUB_OFFLINE forbids looking further" in told and str(cache) in told and told.count("\n") == 1


def test_no_network_is_said_in_one_line(cache, monkeypatch):
    point_at(monkeypatch, 9)
    with pytest.raises(
        FileNotFoundError, match=r"cache, and http://127\.0\.0\.1:9 does not answer: "
    ) as error:
        sp.load("org/name")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_there_is_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetched", lambda *_: pytest.fail("looked up"))
    sp.save(toy(), "org/name")
    sp.load("org/name")
    with pytest.raises(ValueError, match="revision is of models on the hub"):
        sp.load("org/name", revision="main")
    with pytest.raises(FileNotFoundError, match="expected 'tiny'"):
        sp.load("a/b/c")
