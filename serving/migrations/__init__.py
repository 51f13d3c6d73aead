"""How the tables of `schema` came about, for Alembic. One file a change, in ``versions``; changes only add."""
