from __future__ import annotations
from pulse_up import Instance
def test_x(running: Instance) -> None:
    print(running.output, running.curl)
    print(running.send({"a": 1}))
    import time; time.sleep(1)
    print(running.pulse("audit", "--json"))
    print([p.cmdline()[:8] for p in running.family()])
