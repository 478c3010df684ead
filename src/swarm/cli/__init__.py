"""The commands: swarm, swarm-engine, swarm-spawn-ns, swarm-cleanup. Nothing imports it."""
