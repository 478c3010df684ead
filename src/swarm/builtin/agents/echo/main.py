"""The echo agent, and how to write an agent.

Swarm starts this file in a fresh VM, as an unprivileged user, in its work directory (/work), which contains

    input.json    {"inputs": {…}, "ticket": {"id", "title", "description", "project_id"}, "step": {"id", "attempt"}}

The agent writes its result there:

    output.json   any JSON value: it becomes the ticket's `outputs`

What it prints appears live in `swarm ticket logs`. Exit status 0 is success; any other fails the ticket, with the last
printed lines as its error. Only the standard library is available, and nothing of Swarm is imported.
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
