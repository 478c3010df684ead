"""How each kind of VM runs: QEMU, Firecracker under its jailer, a plain process; their consoles, disks and taps.

Imports `swarm.vm.driver` (the Protocol) and `swarm.vm.network`; `choose`, the launcher and the wiring import it.
"""
