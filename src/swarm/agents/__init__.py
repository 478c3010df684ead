"""Agents as they come: a directory, or a .tar.gz of one, with `agent.yaml` and a program.

docs/agents.md tells how to write one. Here, `package` reads manifests, `bundle` copies packages to where nobody edits
them, `check` holds inputs and outputs against their schemas. The host reads an agent's files; it never imports them.
"""

from swarm.agents.bundle import builtin, bundle_digest, install, opened, template, templates
from swarm.agents.package import MANIFEST, Example, Manifest, Package, read, read_package

__all__ = [
    "MANIFEST",
    "Example",
    "Manifest",
    "Package",
    "builtin",
    "bundle_digest",
    "install",
    "opened",
    "read",
    "read_package",
    "template",
    "templates",
]
