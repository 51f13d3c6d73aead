"""What was used, by whom: counted at the engine's door (`account`), brought to the database in batches.

account → metering → spool (this machine's disk) → ledger (the database) → `ah usage`
"""
