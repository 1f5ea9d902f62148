"""Settings to start from, as TOML under `--config`; `fashion` also holds the embedded data and teacher."""
