"""Swarm over HTTP: for now `POST /hooks/NAME`, which starts a workflow. Imports the store; the wiring imports it."""
