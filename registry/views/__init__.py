"""What a person asks of a registry, computed from what `base.Registry` tells: nothing here is kept by a store."""
