"""The frontend's settings: config.properties, overridden by the environment."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from ts.model_server import load_properties

from bundle.digests import digest
from bundle.errors import BundleError
from bundle.paths import ROOT, relative
from bundle.server import frontend
from bundle.server.ports import free_ports
from bundle.signing import key_of
from handlers.core import tracing

CONFIG = ROOT / "config.properties"
SIDE_FILES = sorted((ROOT / "bundle" / "config").iterdir())  # named by config.properties: logs, metrics
ADDRESSES = ("inference_address", "management_address", "metrics_address")
GRPC_PORTS = ("grpc_inference_port", "grpc_management_port")
PATHS = ("model_store", "workflow_store", "metrics_config", "keystore", "certificate_file", "private_key_file")
BOOLEANS = ("true", "false")
BEHIND_PROXY = "BUNDLE_BEHIND_PROXY"  # for handlers/core/headers.py, in the workers
WHOLE_NUMBER = re.compile("[0-9]{1,9}")  # fits into Java's int
UTF_8 = re.compile(r"\.utf-?8", re.IGNORECASE)
SIZES = ("max_request_size", "max_response_size")  # may have a unit, like MAX_BODY of the Docker stack
SIZE = re.compile("([1-9][0-9]{0,8})([kKmM]?)")
BYTES = {"": 1, "k": 2**10, "m": 2**20}
LOG_CONFIG = re.compile(r"-Dlog4j\.configurationFile=(\S+)")


class Settings:
    """The values of config.properties. As in TorchServe, the environment variable TS_<KEY> overrides a key.

    Args:
        overrides: values by key, which override both.
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
        """Return TorchServe's environment.

        Relative paths are resolved from the repository's root, and sizes like 64m are in bytes.
        """
        given = {**os.environ, **self.overrides}
        names = {key: f"TS_{key.upper()}" for key in PATHS}
        paths = {name: given.get(name, self.values.get(key)) for key, name in names.items()}
        sizes = {name: in_bytes(given[name]) for name in map("TS_{}".format, map(str.upper, SIZES)) if name in given}
        return given | {name: str(ROOT / path) for name, path in paths.items() if path} | sizes

    def passed_on(self) -> dict[str, str]:
        """Return TorchServe's environment without secrets, with a locale in which Java can name every file.

        Workers run as the same user, and could read secrets there. TorchServe's own settings stay, including a
        keystore's password.
        """
        kept_back = re.compile(self["blacklist_env_vars"])
        passed = {
            name: value
            for name, value in self.environment().items()
            if name.startswith("TS_") or not kept_back.fullmatch(name)
        }
        locale = next((passed[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if passed.get(name)), "C")
        return passed if UTF_8.search(locale) else passed | {"LC_ALL": "C.UTF-8"}

    @property
    def asks_for_keys(self) -> bool:
        return self["disable_token_authorization"].lower() != "true"

    @property
    def log_config(self) -> Path | None:
        """The Log4j configuration file in `vmargs`, or None."""
        named = LOG_CONFIG.search(self.values.get("vmargs", ""))
        return ROOT / named[1] if named else None

    def url(self, key: str) -> str:
        """Return the address as a URL for clients on this machine."""
        parts = self.address(key)
        return parts.geturl().replace("0.0.0.0", "127.0.0.1").rstrip("/")

    def address(self, key: str) -> SplitResult:
        """Return the parts of an address.

        Raises:
            BundleError: the address is invalid, or TorchServe cannot listen on it.
        """
        try:
            parts = urlsplit(self[key])
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port
        except ValueError:  # unbalanced brackets, or a port beyond 65535
            valid = False
        if not valid:
            raise BundleError(f"{key} is {self[key]!r}, and must look like http://127.0.0.1:8080.")
        if ":" in (parts.hostname or ""):
            raise BundleError(
                f"{key} is {self[key]!r}, and TorchServe's HTTP server cannot listen on an IPv6 address. Use an IPv4 "
                "address, such as http://127.0.0.1:8080, and put a proxy in front for clients with IPv6."
            )
        return parts

    def grpc_target(self) -> str:
        """Return host:port of gRPC inference for clients on this machine."""
        host, port = self.listeners()["grpc_inference_port"]
        local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"[{local}]:{port}" if ":" in local else f"{local}:{port}"

    def listeners(self) -> dict[str, tuple[str, int]]:
        """Return the host and port of each address that TorchServe listens on, by the key that sets the port."""
        http = {key: self.address(key) for key in ADDRESSES}
        found = {key: (parts.hostname or "", parts.port or 0) for key, parts in http.items()}  # both are always there
        return found | {key: (self[key.replace("port", "address")], int(self[key])) for key in GRPC_PORTS}

    def inference_ports(self) -> set[int]:
        """Return the ports of inference: HTTP and gRPC."""
        listeners = self.listeners()
        return {listeners[key][1] for key in ("inference_address", "grpc_inference_port")}

    def check(self) -> None:
        """Check that every setting has the same kind of value as in config.properties.

        Raises:
            BundleError: a number, an address or a boolean is overridden by an invalid value. TorchServe would not
                start, or would use another value; with an invalid BUNDLE_BEHIND_PROXY or an invalid variable of
                OpenTelemetry, no worker would start.
        """
        for key, usual in self.values.items():
            given = self[key]
            if key in SIZES and not WHOLE_NUMBER.fullmatch(given):
                raise BundleError(f"TS_{key.upper()} is {given!r}, and must be a number of bytes, or a size like 64m.")
            if usual.isdigit() and not WHOLE_NUMBER.fullmatch(given):
                raise BundleError(f"TS_{key.upper()} is {given!r}, and must be a whole number, like {usual}.")
            if key in GRPC_PORTS and not 0 < int(given) < 2**16:
                raise BundleError(f"TS_{key.upper()} is {given!r}, and must be a port, like {usual}.")
            if usual in BOOLEANS and given.lower() not in BOOLEANS:
                raise BundleError(f"TS_{key.upper()} is {given!r}, and must be true or false.")
        if (given := os.environ.get(BEHIND_PROXY, "false")).lower() not in BOOLEANS:
            raise BundleError(f"{BEHIND_PROXY} is {given!r}, and must be true or false.")
        try:
            tracing.check(os.environ)
        except ValueError as exc:
            raise BundleError(str(exc)) from exc
        listeners = self.listeners()
        if listeners["inference_address"] == listeners["management_address"]:
            raise BundleError(
                f"inference_address and management_address are both {self['inference_address']}. Give each a port: "
                "otherwise, who may predict may manage, too, and predictions wait for management calls."
            )

    def fingerprint(self) -> dict[str, str]:
        """Return a digest of each setting and file that requires a restart when it changes, by its name.

        A variable TS_<KEY> has the name of the key. Of values there are only digests, because some are secret.
        """
        environment, trusted = self.environment(), key_of("TRUSTED_KEY")
        values = dict(self.values)
        values |= {name[3:].lower(): value for name, value in environment.items() if name.startswith("TS_")}
        values[BEHIND_PROXY] = environment.get(BEHIND_PROXY, "false").lower()
        values |= {name: value for name, value in environment.items() if name.startswith("OTEL_")}
        values["TRUSTED_KEY"] = trusted.read_text() if trusted else ""
        values |= {relative(file): file.read_text() for file in (self.file, *SIDE_FILES)}
        return {name: digest(value) for name, value in values.items()} | frontend.fingerprint(environment)


def in_bytes(size: str) -> str:
    """Return a size like 64m as a number of bytes, and any other text unchanged, for `Settings.check` to report."""
    parsed = SIZE.fullmatch(size)
    return str(int(parsed[1]) * BYTES[parsed[2].lower()]) if parsed else size
