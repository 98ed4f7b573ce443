"""One trial from the parent's side: device, worker process, sensors, result."""
