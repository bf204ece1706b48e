"""Load tests whose numbers can be believed: open loop, every request accounted for, pass or fail.

Knows only the wire protocol, so it drives any server of the Open Inference Protocol. `python -m loadtests --help` is
the manual; `docs/load-testing.md` says how to measure honestly."""
