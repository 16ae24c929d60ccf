"""An OpenAI-compatible server on the engine. What a recurrent state adds has routes of its own, under /v1/states."""
