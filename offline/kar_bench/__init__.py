"""Owns the benchmarks behind `kar bench`: performance against the bare libraries, and studies of quality.

A benchmark is one module with its measurement, table, plot and command. A large one is a package of `measure`,
`report`, `command` and its parts. All use `harness`. The product imports none of them.
"""
