"""How the commands talk HTTP to a server on this machine."""

import requests

SECONDS = 30  # for one answer; no request of the bundle's own takes longer
session = requests.Session()
session.trust_env = False  # a proxy for the internet knows nothing of this machine's loopback
