"""What the commands draw on a terminal: tables, progress, live views. Imports values; only `swarm.cli` imports it."""
