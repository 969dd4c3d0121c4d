"""`python -m shopr1_service` is `shopr1`."""

from shopr1_service.cli import main

main()
