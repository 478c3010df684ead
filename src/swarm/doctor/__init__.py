"""`swarm doctor`: what is wrong on this host, why, and the command that fixes it.

`host` checks the machine, `home` the database, `vm_path` the way of a packet to each VM; `production` checks how well
the host isolates VMs, `capacity` how many fit. Checks try the thing itself (make a bridge in a temporary namespace,
read sshd's banner) instead of looking for signs of it, and none changes anything.
"""

from swarm.doctor.check import Check, Status

__all__ = ["Check", "Status"]
