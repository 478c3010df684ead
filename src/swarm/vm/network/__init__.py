"""The network of VMs: namespaces, bridge, firewall rules. Imports only `swarm.vm.driver`."""
