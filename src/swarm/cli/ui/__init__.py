"""What the commands draw on a terminal: tables, progress, reports, the live view. Only `swarm.cli` imports it."""
