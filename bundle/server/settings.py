"""The frontend's settings: config.properties under the environment."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from ts.model_server import load_properties

from bundle.errors import BundleError
from bundle.paths import ROOT
from bundle.server.ports import free_ports
from bundle.signing import key_of

CONFIG = ROOT / "config.properties"
SIDE_FILES = sorted((ROOT / "bundle" / "config").iterdir())  # what config.properties names: logs, metrics
ADDRESSES = ("inference_address", "management_address", "metrics_address")
GRPC_PORTS = ("grpc_inference_port", "grpc_management_port")
PATHS = ("model_store", "workflow_store", "metrics_config", "keystore", "certificate_file", "private_key_file")
BOOLEANS = ("true", "false")
WHOLE_NUMBER = re.compile("[0-9]{1,9}")  # what Java's int holds
LOG_CONFIG = re.compile(r"-Dlog4j\.configurationFile=(\S+)")


class Settings:
    """config.properties under the environment: TS_<KEY> overrides a key, as TorchServe itself does it.

    Args:
        overrides: values by key, above both.
    """

    def __init__(self, file: Path = CONFIG, overrides: Mapping[str, str] | None = None):
        self.file = file
        self.values = load_properties(str(file))
        self.overrides = {f"TS_{key.upper()}": value for key, value in (overrides or {}).items()}

    @classmethod
    def isolated(cls, store: Path, **overrides: str) -> "Settings":
        """Return settings that keep a server apart from every other: free ports on loopback, no tokens, its own store.

        Args:
            store: the folder of its archives.
            overrides: further values by key.
        """
        keys = (*ADDRESSES, *GRPC_PORTS)
        ports = dict(zip(keys, free_ports(len(keys)), strict=True))
        values = {key: f"http://127.0.0.1:{ports[key]}" for key in ADDRESSES}
        values |= {key: str(ports[key]) for key in GRPC_PORTS}
        values |= {key.replace("port", "address"): "127.0.0.1" for key in GRPC_PORTS}
        values |= {"model_store": str(store), "disable_token_authorization": "true"}
        return cls(overrides=values | overrides)

    def __getitem__(self, key: str) -> str:
        return self.environment().get(f"TS_{key.upper()}", self.values[key])

    def environment(self) -> dict[str, str]:
        """What TorchServe finds in its environment. Relative paths are the repository's, wherever it is started."""
        given = {**os.environ, **self.overrides}
        names = {key: f"TS_{key.upper()}" for key in PATHS}
        paths = {name: given.get(name, self.values.get(key)) for key, name in names.items()}
        return given | {name: str(ROOT / path) for name, path in paths.items() if path}

    def passed_on(self) -> dict[str, str]:
        """The environment without what is kept from workers: as the same user, they could read TorchServe's. Its own
        settings stay, a keystore's password among them."""
        kept_back = re.compile(self["blacklist_env_vars"])
        return {
            name: value
            for name, value in self.environment().items()
            if name.startswith("TS_") or not kept_back.fullmatch(name)
        }

    @property
    def asks_for_keys(self) -> bool:
        return self["disable_token_authorization"].lower() != "true"

    @property
    def log_config(self) -> Path | None:
        """What vmargs names; None where it names nothing."""
        named = LOG_CONFIG.search(self.values.get("vmargs", ""))
        return ROOT / named[1] if named else None

    def url(self, key: str) -> str:
        """The address as a client on this machine calls it."""
        parts = self.address(key)
        return parts.geturl().replace("0.0.0.0", "127.0.0.1").rstrip("/")

    def address(self, key: str) -> SplitResult:
        """The address, taken apart.

        Raises:
            BundleError: not of the form http://host:port.
        """
        try:
            parts = urlsplit(self[key])
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port
        except ValueError:  # brackets that do not match, a port beyond 65535
            good = False
        if not good:
            raise BundleError(f"{key} is {self[key]!r}, and must look like http://127.0.0.1:8080.")
        return parts

    def listeners(self) -> dict[str, tuple[str, int]]:
        """Host and port of everything that TorchServe listens on, by the key that sets the port."""
        http = {key: (self.address(key).hostname, self.address(key).port) for key in ADDRESSES}
        return http | {key: (self[key.replace("port", "address")], int(self[key])) for key in GRPC_PORTS}

    def inference_ports(self) -> set[int]:
        """Where clients' predictions arrive: HTTP and gRPC."""
        listeners = self.listeners()
        return {listeners[key][1] for key in ("inference_address", "grpc_inference_port")}

    def check(self) -> None:
        """Holds every setting to the kind of value that config.properties has for it.

        Raises:
            BundleError: a number, an address, true or false was overridden by something else: TorchServe would not
                start, or take it for another value.
        """
        for key, usual in self.values.items():
            given = self[key]
            if usual.isdigit() and not WHOLE_NUMBER.fullmatch(given):
                raise BundleError(f"TS_{key.upper()} is {given!r}, and must be a whole number, like {usual}.")
            if key in GRPC_PORTS and not 0 < int(given) < 2**16:
                raise BundleError(f"TS_{key.upper()} is {given!r}, and must be a port, like {usual}.")
            if usual in BOOLEANS and given.lower() not in BOOLEANS:
                raise BundleError(f"TS_{key.upper()} is {given!r}, and must be true or false.")
        self.listeners()

    def fingerprint(self) -> str:
        overrides = sorted(f"{key}={value}" for key, value in self.environment().items() if key.startswith("TS_"))
        trusted = [key] if (key := key_of("TRUSTED_KEY")) else []
        texts = [file.read_text() for file in (self.file, *SIDE_FILES, *trusted)]
        return hashlib.sha256("\n".join([*texts, *overrides]).encode()).hexdigest()
