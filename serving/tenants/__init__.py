"""Who is served: `tenants` and `keys` in the database, `access` as a server knows it, and their `quota`."""
