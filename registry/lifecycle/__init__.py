"""What ends: blobs that nothing names, versions past their time, tenants that are deleted.

`intents` and `condemned` are the handshake between who publishes and who collects (docs/decisions/0012); `gc` collects,
`retention` says which versions may go, `tombstones` keep the name of a deleted tenant from being given again.
"""
