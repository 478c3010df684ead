"""`swarm doctor`: what is wrong here, why, and the command that mends it.

`host` looks at the machine, `home` at the database and the image, `path` follows the way of a packet to each VM. Every
check looks at the thing itself (it makes a bridge in a throw-away namespace, it reads sshd's banner) and not at a sign
of it, and none changes anything.
"""

from swarm.doctor.check import Check, Status

__all__ = ["Check", "Status"]
