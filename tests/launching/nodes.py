"""A host with a script in the place of its ranks."""

from hftcli.launching.cluster import Node, NodeOrder
from hftcli.launching.hosts import Host


def make_node(name: str, script: str) -> Node:
    return Node(
        Host(name, 1, f"hosts:{name}"), 0, NodeOrder(command=("bash", "-c", script), environment={"MARK": "m"}, num_processes=1)
    )
