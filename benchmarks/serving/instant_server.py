"""The service without a model, for measurements of everything around it: `instant_server.py RECIPE`.

Its policy returns constants at once. The port is printed before it is ready; the service ends with its
standard input. Run as a file with another checkout on `PYTHONPATH`, it serves that one, also an old one.
"""

import socket
import sys
import threading

import uvicorn

from shopr1_service.settings import Settings

try:
    from shopr1_service.policy.fake import FakePolicy
    from shopr1_service.scheduling.local_engine import LocalEngine
    from shopr1_service.server.app import create_app
    from shopr1_service.server.http_protocol import connection_class

    open_engine = LocalEngine.opener(FakePolicy)
except ImportError:  # before these packages existed
    from shopr1_service.app import create_app
    from shopr1_service.connection import connection_class
    from shopr1_service.fake import FakePolicy

    open_engine = FakePolicy

BACKLOG = 4096


def main(recipe: str) -> None:
    settings = Settings(recipe=recipe)
    app = create_app(settings, open_engine)
    config = uvicorn.Config(
        app, http=connection_class(settings.receive_timeout_s), log_level="error", ws="none"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
