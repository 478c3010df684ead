"""nftables rules, as text for ``nft -f -``: one table on the host, one pair per namespace, all named ``swarm``.

A VM is confined twice. Its own namespace drops connections that the guest opens, and at the tap frames with a false
source; the host drops the same again at the bridge, in case the first barrier has a hole. The guest can connect only
to two ports (gateway, proxy) at its namespace's end of the tap. They are open only while its attempt runs and its
agent's policy allows it, and the engine makes every connection that leaves the host.

No rule remembers connections: what `conntrack -F`, a full table or a short timeout forgets would end a running ticket.
An answer is recognized by itself instead: TCP with ACK or RST, which opens no connection, or the echo of a ping.
"""

from __future__ import annotations

import hashlib
from ipaddress import IPv4Address, IPv4Network

from swarm.vm.driver import (
    AGENTD_PORT,
    GATEWAY_PORT,
    GUEST_ADDRESS,
    GUEST_GATEWAY,
    GUEST_MAC,
    PROXY_PORT,
    TAP_NAME,
)

TABLE = "swarm"
LIMIT_TABLE = "swarm-limit"  # in the namespace of a VM whose sending is limited
NO_LIMIT = f"add table netdev {LIMIT_TABLE}\ndelete table netdev {LIMIT_TABLE}\n"
REFUSED = "refused"  # the counter of frames dropped at a namespace's tap
_OWNER = "swarm-engine"
_ETH_P_RARP = 0x8035  # linux/if_ether.h
_ANSWERS = ("tcp flags & (ack | rst) != 0", "icmp type echo-reply")


def for_host(subnet: IPv4Network, bridge: str) -> str:
    """The table ``inet swarm``, replaced as a whole in one transaction. Its comment has its owner and a digest of it.

    ``input``: a VM may answer the host, but open no connection to it. ``forward``: nothing from or to a VM. ``output``:
    only root may connect to agentd's port, since the first connection to a new agentd sets its token.
    """
    body = f"""
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname "{bridge}" {_ANSWERS[0]} accept
    iifname "{bridge}" {_ANSWERS[1]} accept
    iifname "{bridge}" drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname "{bridge}" drop
    oifname "{bridge}" drop
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    oifname "{bridge}" ip daddr {subnet} tcp dport {AGENTD_PORT} meta skuid != 0 reject with tcp reset
  }}
"""
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    head = f'  comment "{_OWNER} {digest}"\n'
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{head}{body}}}\n"


def comment_of(rules: str) -> str:
    return rules.partition('comment "')[2].partition('"')[0]


def is_ours(comment: str) -> bool:
    return comment.startswith(_OWNER + " ")


def for_vm(address: IPv4Address, uplink: str) -> str:
    """Tables of one namespace: ``netdev swarm`` filters at the tap, ``ip swarm`` rewrites addresses 1:1 and filters.

    Frames dropped at the tap (another source address, MAC or protocol than the guest's own) are counted: REFUSED. RARP
    is not counted, since QEMU itself announces each clone by it."""
    return f"""
table netdev {TABLE} {{
  counter {REFUSED} {{ }}
  chain tap {{
    type filter hook ingress device "{TAP_NAME}" priority filter; policy drop;
    ether saddr {GUEST_MAC} ip saddr {GUEST_ADDRESS} accept
    ether saddr {GUEST_MAC} arp saddr ether {GUEST_MAC} arp saddr ip {GUEST_ADDRESS} accept
    ether saddr {GUEST_MAC} ether type {_ETH_P_RARP:#x} drop
    counter name "{REFUSED}"
  }}
}}
table ip {TABLE} {{
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{uplink}" ip daddr != {address} drop
    iifname "{uplink}" ip daddr set {GUEST_ADDRESS}
  }}
  chain postrouting {{
    type filter hook postrouting priority srcnat; policy accept;
    oifname "{uplink}" ip saddr {GUEST_ADDRESS} ip saddr set {address}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname "{uplink}" oifname "{TAP_NAME}" accept
    iifname "{TAP_NAME}" oifname "{uplink}" {_ANSWERS[0]} accept
    iifname "{TAP_NAME}" oifname "{uplink}" {_ANSWERS[1]} accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "{TAP_NAME}" ip daddr {GUEST_GATEWAY} tcp dport {{ {GATEWAY_PORT}, {PROXY_PORT} }} accept
  }}
}}
"""


def for_sender(bytes_per_second: int, burst_bytes: int) -> str:
    """A table that drops what a VM sends beyond a rate. (For what it receives see `netns.limit_receiving`.)"""
    return f"""{NO_LIMIT}
table netdev {LIMIT_TABLE} {{
  chain tap {{
    type filter hook ingress device "{TAP_NAME}" priority filter - 10; policy accept;
    limit rate over {bytes_per_second} bytes/second burst {burst_bytes} bytes drop
  }}
}}
"""
