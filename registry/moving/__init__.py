"""From one registry to another: `copying`, whole `mirror`s, and `bundles` for sites without a network."""
