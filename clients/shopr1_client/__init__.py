"""Client side of the Shop-R1 reward service: wire models, errors, client. Needs no torch."""

from shopr1_client.async_client import AsyncClient
from shopr1_client.client import Client
from shopr1_client.errors import (
    MixedVersionsError,
    ProblemError,
    SettingsError,
    ShopR1Error,
    TransportError,
)

__all__ = [
    "AsyncClient",
    "Client",
    "MixedVersionsError",
    "ProblemError",
    "SettingsError",
    "ShopR1Error",
    "TransportError",
]
