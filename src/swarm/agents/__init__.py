"""Agent packages: a directory, or a .tar.gz of one, with `agent.yaml` and a program.

docs/agents.md explains how to write one. `package` reads manifests, `bundle` installs read-only copies, `installed`
checks rows against these copies, `check` checks inputs and outputs against their schemas. The host reads an agent's
files but never imports them.
"""

from swarm.agents.bundle import builtin, bundle_digest, install, opened, packed, template, templates
from swarm.agents.installed import Installed, here, is_copy
from swarm.agents.package import MANIFEST, Example, Manifest, Package, read, read_package

__all__ = [
    "MANIFEST",
    "Example",
    "Installed",
    "Manifest",
    "Package",
    "builtin",
    "bundle_digest",
    "here",
    "install",
    "is_copy",
    "opened",
    "packed",
    "read",
    "read_package",
    "template",
    "templates",
]
