"""`${…}`: expressions in CEL, the Common Expression Language. docs/adr/0011-cel.md says why and how.

`expression` reads them and says what they refer to; `evaluate` runs the cheap ones here; `jail` runs the rest in a
process that the kernel bounds in time and memory; `template` fills whole JSON values with them.
"""
