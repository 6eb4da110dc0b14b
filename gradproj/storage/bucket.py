"""Open the store of an address with obstore, with credentials from where the SDKs look."""

import importlib
import os
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from gradproj.errors import ConfigError
from gradproj.storage import hub
from gradproj.storage.address import Address
from gradproj.storage.failures import explained
from gradproj.storage.retry import POLICY, RetryPolicy

INSTALL = "pip install 'gradproj[cloud]'"
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""Variables that name another server than a cloud's own; the first that is set counts."""
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "HF_")
# Credentials of botocore are asked for again after this long: a login in between is noticed.
_FRESH = timedelta(minutes=5)


def library(name: str, what: str = "a remote address") -> Any:
    """Import an optional library.

    Raises:
        ConfigError: it is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(f"{what} needs the package {package}: {INSTALL}") from error


def open_bucket(
    address: Address, *, anonymous: bool | None = None, policy: RetryPolicy = POLICY
) -> tuple[Any, str]:
    """Return the obstore store of an address's bucket, and the address's key in it.

    Stores are kept: later calls share the connections. ``anonymous`` sends no credentials; by
    default it is the address's own.

    Raises:
        ConfigError: obstore is not installed, there are no credentials, or a setting is unusable.
    """
    library("obstore")
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(_SETTINGS)))
    without = address.anonymous if anonymous is None else anonymous
    return _open(address.origin, without, policy, settings), address.key


@lru_cache(maxsize=64)
def _open(
    origin: Address, anonymous: bool, policy: RetryPolicy, _: tuple[tuple[str, str], ...]
) -> Any:
    stores = importlib.import_module("obstore.store")
    endpoints = filter(None, map(os.environ.get, _ENDPOINTS.get(origin.scheme, ())))
    is_http = next(endpoints, "").lower().startswith("http://")
    client = policy.of_client() | {"allow_http": is_http}
    options: dict[str, Any] = {"client_options": client, "retry_config": policy.of_obstore()}
    with explained(origin, ConfigError):
        if origin.scheme == "s3":
            return _s3(stores, origin, anonymous, options)
        if origin.scheme in ("gs", "az"):
            if anonymous:
                options["skip_signature"] = True
            if origin.scheme == "gs":
                _check_google(origin)
                return stores.GCSStore(origin.bucket, **options)
            _check_azure(origin)
            return stores.AzureStore(origin.bucket, **options)
        return _web(stores, origin, anonymous, options)


def _s3(stores: Any, origin: Address, anonymous: bool, options: dict[str, Any]) -> Any:
    if anonymous:
        return stores.S3Store(origin.bucket, skip_signature=True, **options)
    if not (os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY")):
        credentials = AwsCredentials(origin)
        options["credential_provider"] = credentials
        if credentials.region:
            options["region"] = credentials.region
    return stores.S3Store(origin.bucket, **options)


def _web(stores: Any, origin: Address, anonymous: bool, options: dict[str, Any]) -> Any:
    url, client = str(origin), options["client_options"]
    if origin.scheme == "hf":
        url, token = hub.base_of(origin), "" if anonymous else hub.token()
        if token:  # the client does not pass it on to the server that a redirect names
            client["default_headers"] = {"Authorization": f"Bearer {token}"}
    client["allow_http"] = url.startswith("http://")
    return stores.HTTPStore.from_url(url, **options)


def _check_google(origin: Address) -> None:
    name = "GOOGLE_APPLICATION_CREDENTIALS"
    if os.environ.get(name) and not os.path.isfile(os.environ[name]):
        raise ConfigError(f"{origin}: {name} names no file; set it to a file of credentials")


def _check_azure(origin: Address) -> None:
    names = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING")
    if not any(os.environ.get(name) for name in names):
        raise ConfigError(f"{origin}: set {names[0]} to the storage account of the container")


class AwsCredentials:
    """Credentials from where the AWS CLI finds them: profiles, logins, roles.

    obstore itself knows the environment's keys and roles of instances, but no profiles and logins.
    """

    def __init__(self, origin: Address) -> None:
        self._origin = origin
        self.region = ""
        self._credentials = self._find()

    def __call__(self) -> dict[str, Any]:
        """Return credentials as obstore wants them. They are asked for again after minutes."""
        if not hasattr(self._credentials, "refresh_needed"):  # of a file, which may be newer now
            self._credentials = self._find()
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _FRESH,
        }

    def _find(self) -> Any:
        sessions = library("botocore.session", f"{self._origin} without keys in the environment")
        try:
            session = sessions.Session()
            found = session.get_credentials()
            self.region = session.get_config_variable("region") or ""
        except library("botocore.exceptions").BotoCoreError as error:
            raise ConfigError(
                f"{self._origin}: the AWS profile or login cannot be used "
                f"({type(error).__name__}); check AWS_PROFILE and the "
                "files in ~/.aws, or log in again"
            ) from None
        if found is None:
            raise ConfigError(
                f"{self._origin}: no AWS credentials were found; set AWS_PROFILE, or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --anonymous for a public "
                "bucket"
            )
        return found
