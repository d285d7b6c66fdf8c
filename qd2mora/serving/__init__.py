"""A run, an export or a base behind OpenAI's interface, adapters side by side. FastAPI and uvicorn are an extra."""
