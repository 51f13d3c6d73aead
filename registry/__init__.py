"""The registry: immutable versions, movable channels, no server.

from adapterhub.registry import open_registry

registry = open_registry("file:///srv/adapters")
record = registry.publish(draft(path), name=AdapterName.parse("acme/support"), author="ana")
registry.set_channel(record.name, "prod", {record.version: 100}, who="ana")
folder = Cache(cache_path, registry).fetch(registry.resolve(AdapterRef.parse("acme/support@prod")).record)
"""
