"""The network of VMs: namespaces, bridge, firewall rules. Imports `swarm.vm.driver` alone."""
