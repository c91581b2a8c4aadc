"""The HTTP session of the commands, for a server on this machine."""

import requests

SECONDS = 30  # timeout of one request
session = requests.Session()
session.trust_env = False  # an internet proxy cannot reach this machine's loopback
