#!/opt/shopr1/bin/python -IS
"""Exit code 0 if the service in this container answers the given path with 200.

Small images have no curl. Only the standard library is imported, because the check runs every few seconds.
"""

import http.client
import os
import ssl
import sys

TIMEOUT_S = 5.0


def connect(port: int) -> http.client.HTTPConnection:
    if not os.environ.get("SHOPR1_TLS_CERT_FILE"):
        return http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False  # the certificate names another host
    unverified.verify_mode = ssl.CERT_NONE  # the connection stays on the loopback interface
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=unverified)


def main() -> int:
    port = int(os.environ.get("SHOPR1_PORT", "8000"))
    connection = connect(port)
    try:
        connection.request("GET", sys.argv[1])
        return 0 if connection.getresponse().status == http.client.OK else 1
    except OSError as error:
        print(f"port {port}: {error}", file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
