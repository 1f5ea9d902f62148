"""Infrastructure. settings, run_folder, exit, exit_codes: a command and its folder; launch, start, zero,
precision: processes; checkpoint, stopping, heartbeat: surviving; log, follow_log, trackers, watch: telling.
"""
