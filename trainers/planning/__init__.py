"""What a training will take, before anything but the base's ``config.json`` is there: `shapes` → `memory` → `plan`."""
