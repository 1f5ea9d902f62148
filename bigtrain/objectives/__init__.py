"""The papers' equations: one pure function each, float32 inside."""
