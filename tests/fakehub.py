"""A hub with two repositories: one gated, whose token is "good", and one with an ONNX pair."""

from __future__ import annotations

import hashlib
import json

from fakehost import Request

COMMIT = "c0ffee" * 6 + "c0ff"
PUBLIC = "onnx-community/sam3-tracker-ONNX"
PRECISIONS = ("", "_fp16", "_q4")
FILES = {
    f"{PUBLIC}/onnx/{stem}{suffix}.onnx{data}": f"{stem}{suffix}{data}".encode() * 1000
    for stem in ("vision_encoder", "prompt_encoder_mask_decoder")
    for suffix in PRECISIONS
    for data in ("", "_data")
    if (stem, data) != ("prompt_encoder_mask_decoder", "_data") or not suffix
} | {
    "facebook/sam3/config.json": b"{}",
    "facebook/sam3/model.safetensors": b"weights" * 1000,
}


def _declared(path: str) -> str:
    """What the hub says of a file: SHA-256, or the id of the blob for what is small text."""
    content = FILES[path]
    if path.endswith(".json"):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def answer(request: Request) -> None:
    tree = f"/api/models/{PUBLIC}/tree/main/onnx"
    if request.path.startswith(tree):
        entries = [
            {"type": "file", "path": path.removeprefix(PUBLIC + "/"), "oid": "0", "size": len(data)}
            for path, data in FILES.items()
            if path.startswith(PUBLIC)
        ]
        request.status(200, json.dumps(entries).encode(), Content_Type="application/json")
        return
    repository, _, rest = request.path[1:].partition("/resolve/")
    revision, _, name = rest.partition("/")
    path = f"{repository}/{name}"
    if repository.startswith("facebook/") and request.headers.get("Authorization") != "Bearer good":
        code = 403 if request.headers.get("Authorization") == "Bearer stranger" else 401
        request.status(code, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
    elif path not in FILES:
        request.status(404, X_Error_Code="EntryNotFound")
    elif request.command == "HEAD":
        assert revision == "main"
        size = str(len(FILES[path]))
        etag = f'"{_declared(path)}"'
        request.status(
            200, X_Repo_Commit=COMMIT, X_Linked_Etag=etag, X_Linked_Size=size, Content_Length=size
        )
    else:
        assert revision == COMMIT
        request.serve(FILES[path])
