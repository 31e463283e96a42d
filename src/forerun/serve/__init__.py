"""An OpenAI-compatible server on one engine: `app.app_of` makes it, `run.serve` runs it (extra `serve`)."""
