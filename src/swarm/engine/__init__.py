"""Running attempts: `dispatch` claims them, `worker` keeps their leases, `engine` runs one in a VM. Holding sandboxes:
`sandboxes`, whose VMs are made by `machines`, and reached by `live`.

Imports the store, `swarm.vm.launcher`, the channel and the gateway; the wiring imports it.
"""
