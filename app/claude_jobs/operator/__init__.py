"""What the operator's playbooks run beside a service of the pool, in its container.

Each prints one JSON document and ends. Nothing here is part of the HTTP interface.
"""
