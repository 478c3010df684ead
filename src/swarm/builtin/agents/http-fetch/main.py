"""The http-fetch agent: one request with the standard library. agent.yaml lists its inputs and outputs.

An example of an agent that uses the network: it speaks only http and https (after a redirect too), everything is
bounded, and an unexpected status is a failure that names it.
"""

# ruff: noqa: T201

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.request import Request


class OnlyHttp(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(
        self, request: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not newurl.startswith(("http://", "https://")):
            raise SystemExit(f"http-fetch: redirected to {newurl[:200]!r}, which is not http")
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def main() -> None:
    inputs = json.loads(Path("input.json").read_text(encoding="utf-8"))["inputs"]
    url = inputs["url"]
    if not url.startswith(("http://", "https://")):
        raise SystemExit(f"http-fetch: {url[:200]!r} is not an http or https address")
    headers = {"User-Agent": "swarm-http-fetch/1.0", **inputs.get("headers", {})}
    body = inputs.get("body")
    data = body.encode() if body is not None else None
    if "json" in inputs:
        data = json.dumps(inputs["json"]).encode()
        headers.setdefault("Content-Type", "application/json")
    method = inputs.get("method", "GET")
    request = Request(url, data=data, headers=headers, method=method)
    opener = urllib.request.build_opener(OnlyHttp)
    limit = inputs.get("max_bytes", 1 << 20)
    print(f"{method} {url}", flush=True)
    try:
        with opener.open(request, timeout=inputs.get("timeout_seconds", 30)) as answer:
            status, got, final = answer.status, answer.headers, answer.url
            content = answer.read(limit + 1)
    except urllib.error.HTTPError as error:
        status, got, final = error.code, error.headers, error.url
        content = error.read(limit + 1)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise SystemExit(
            f"http-fetch: {url[:200]} can't be reached: {reason}; does the network policy allow it?"
        ) from None
    made = {"status": status, "url": final, "headers": {k.lower(): v for k, v in got.items()}}
    made["truncated"] = len(content) > limit
    content = content[:limit]
    try:
        made["text"] = content.decode(got.get_content_charset("utf-8"))
    except (UnicodeDecodeError, LookupError):
        made["base64"] = base64.b64encode(content).decode()
    if "json" in got.get_content_type() and "text" in made and not made["truncated"]:
        try:
            made["json"] = json.loads(made["text"])
        except ValueError:
            print("http-fetch: the body is declared as JSON, but is not", flush=True)
    Path("output.json").write_text(json.dumps(made), encoding="utf-8")
    expected = inputs.get("expect") or range(200, 300)
    print(f"{status}, {len(content)} bytes", flush=True)
    if status not in expected:
        raise SystemExit(f"http-fetch: {url[:200]} answered {status}, which was not expected")


if __name__ == "__main__":
    main()
