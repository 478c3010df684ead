"""The echo agent, and how to write an agent.

Swarm starts this file in a fresh VM, as an unprivileged user, in a directory of its own (/work) that holds

    input.json    {"inputs": {…}, "ticket": {"id", "title", "description", "project_id"}, "step": {"id", "attempt"}}

and takes from there

    output.json   any JSON value: it becomes the ticket's `outputs`

What is printed shows up live in `swarm ticket logs`. Exit status 0 is success; anything else fails the ticket, with the
last lines that were printed as its error. Only the standard library is here, and nothing of Swarm is imported.
"""

# ruff: noqa: T201

import json
from pathlib import Path


def main() -> None:
    given = json.loads(Path("input.json").read_text(encoding="utf-8"))
    ticket = given["ticket"]
    print(f"echo: ticket {ticket['id']}, attempt {given['step']['attempt']}", flush=True)
    result = {
        "echo": given["inputs"],
        "message": f"Echo of ticket {ticket['id']}",
        "ticket_id": ticket["id"],
        "title": ticket["title"],
        "description": ticket["description"],
    }
    Path("output.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
