"""What has no ideas in it: settings, start, optimiser, checkpoints, stopping, logs."""
