"""Packages of the extra ``service``: a command that needs them says so in one line."""

from importlib.util import find_spec

from ..spec.errors import MoeplanError

DRAWN = ("jinja2", "plotly")
"""What reports and the page are made with."""
NEEDED = ("fastapi", "uvicorn", "sqlalchemy", "alembic", "psycopg", "prometheus_client", "fsspec", "multipart", *DRAWN)


def check_service(*names: str) -> None:
    """Raise MoeplanError where one of these packages is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MoeplanError(f"{missing[0]} is not installed: pip install 'moeplan[service]'")
