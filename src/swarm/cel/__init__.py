"""`${…}`: expressions in CEL, the Common Expression Language. docs/adr/0011-cel.md says why and how.

`expression` parses them and finds what they refer to; `evaluate` runs the cheap ones in this process; `jail` runs the
rest in a process that the kernel bounds in time and memory; `template` fills JSON values with their results.
"""
