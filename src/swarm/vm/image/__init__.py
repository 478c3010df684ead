"""Guest images and the layers that agents add to them: built once, named by digest, never changed.

Imports `swarm.vm.driver` alone; the wiring imports it.
"""
