"""Reads input.json, writes output.json. What it prints shows up live in `swarm ticket logs -f`."""

# ruff: noqa: T201

import json
from pathlib import Path


def main() -> None:
    given = json.loads(Path("input.json").read_text(encoding="utf-8"))
    name = given["inputs"]["name"]
    print(f"greeting {name}", flush=True)
    Path("output.json").write_text(json.dumps({"greeting": f"Hello, {name}!"}), encoding="utf-8")


if __name__ == "__main__":
    main()
