"""Swarm over HTTP: the API (`/v1`) and webhooks (`POST /hooks/NAME`). The wiring imports it."""
