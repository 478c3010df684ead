"""Swarm over HTTP. For now, one thing: `POST /hooks/NAME`, which starts a workflow."""
