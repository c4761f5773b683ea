"""Several processes: sharding, sharded loading, consistency between ranks."""
