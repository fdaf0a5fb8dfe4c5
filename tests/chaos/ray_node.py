"""`ray start ...` of a node that stays on the loopback address, as the head of a local cluster does.

Ray itself would look for the machine's outer address in place of it, where that head does not listen.
"""

from ray._private import services
from ray.scripts.scripts import main

from orchestrator.processes import HOST

if __name__ == "__main__":
    services.get_node_ip_address = lambda *_: HOST
    main()
