"""The service over HTTP: ``app.create_app`` for ASGI servers, ``serve.serve`` for uvicorn."""
