"""Which VMs exist on this host and who owns them; network slots kept for reuse; removing what dead owners left.

Imports drivers and network; the launcher and the commands import it.
"""
