"""What a server tells of itself: `flight` is one request's account; `telemetry` hands it to all who keep count."""
