"""An OpenAI-compatible HTTP endpoint for a routed model: protocol, batching engine, application."""
