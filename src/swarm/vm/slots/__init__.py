"""Which VMs exist on this host and who owns them; network slots kept for reuse; removal of what dead owners left."""
