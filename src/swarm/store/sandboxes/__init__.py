"""Sandboxes and snapshots: VMs that somebody holds, and what is kept of them on a host's disk.

Imports tickets (events, bad rows) and the registry (agents); the Store imports it.
"""
