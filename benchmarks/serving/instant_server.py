"""The service without a model, for measurements of everything around it.

Its recipe is Shop-R1 with weight 0 for self-certainty, and its policy does nothing. The port is printed
before it is ready; the service ends with its standard input. Run as a file with another checkout on
`PYTHONPATH`, it serves that one, also an old one.
"""

import socket
import sys
import tempfile
import threading
from importlib import import_module, resources
from typing import Any

import uvicorn

from shopr1_service.settings import Settings

BACKLOG = 4096


def main() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        shipped = (resources.files("shopr1_rewards") / "recipes" / "shop_r1.toml").read_text("utf-8")
        assert "alpha = 0.005" in shipped
        file.write(shipped.replace("alpha = 0.005", "alpha = 0.0"))
        file.flush()
        app, connection = application(Settings(recipe=file.name))
    server = uvicorn.Server(uvicorn.Config(app, http=connection, log_level="error", ws="none"))
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()
        server.should_exit = True
        thread.join()


def application(settings: Settings) -> tuple[Any, Any]:
    """The application, and the class of its connections."""
    try:
        policy = module("policy.fake").FakePolicy
        open_engine = module("scheduling.local_engine").LocalEngine.opener(policy)
        app, protocol = module("server.app"), module("server.http_protocol")
    except ModuleNotFoundError:  # a checkout from before these packages
        open_engine = module("fake").FakePolicy
        app, protocol = module("app"), module("connection")
    return app.create_app(settings, open_engine), protocol.connection_class(settings.receive_timeout_s)


def module(name: str) -> Any:  # noqa: ANN401  # of any checkout
    return import_module(f"shopr1_service.{name}")


if __name__ == "__main__":
    main()
