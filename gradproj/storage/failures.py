"""Meanings of a remote store's errors: a reason for code, and one line for people.

The text of obstore's errors holds addresses, request ids and whatever a server answered, so none of
it is shown: a message is made of the reason, the store's error code and the HTTP status.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from gradproj.errors import GradprojError, StoreError
from gradproj.storage.address import Address, Location

Reason = Literal[
    "missing", "no bucket", "denied", "credentials", "expired", "exists", "changed", "conflict",
    "range", "unsupported", "region", "unavailable", "unreachable", "other",
]  # fmt: skip

RETRIED: tuple[Reason, ...] = ("unavailable", "unreachable", "conflict")
"""Reasons that pass. A 409 is neither yes nor no: of two writes at once one is sent away."""

_STATUS = re.compile(r"status code: (\d{3})|\bstatus: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>|\"(?:code|reason)\": ?\"(\w{1,60})\"")
_OF_CODE: dict[str, Reason] = {
    "NoSuchBucket": "no bucket", "ContainerNotFound": "no bucket",
    "ExpiredToken": "expired", "ExpiredTokenException": "expired",
    "TokenRefreshRequired": "expired",
    "InvalidAccessKeyId": "credentials", "SignatureDoesNotMatch": "credentials",
    "InvalidToken": "credentials", "AuthorizationHeaderMalformed": "region",
    "AuthFailure": "credentials", "AuthenticationFailed": "credentials",
    "RequestTimeTooSkewed": "credentials", "InvalidClientTokenId": "credentials",
    # Azure's word for a refused If-None-Match: a 409, which elsewhere is neither yes nor no.
    "BlobAlreadyExists": "exists",
    "AccessDenied": "denied", "PermanentRedirect": "region",
    "SlowDown": "unavailable", "RequestTimeout": "unavailable",
    # The parts of an upload that is done, whose reply was lost, or that somebody ended.
    "NoSuchUpload": "unavailable",
}  # fmt: skip
_OF_TYPE: dict[str, Reason] = {
    "FileNotFoundError": "missing", "PermissionDeniedError": "denied",
    "UnauthenticatedError": "credentials", "AlreadyExistsError": "exists",
    "PreconditionError": "changed", "NotSupportedError": "unsupported",
}  # fmt: skip
_OF_STATUS: dict[int, Reason] = {
    301: "region", 307: "region", 401: "credentials", 403: "denied", 404: "missing",
    408: "unavailable", 409: "conflict", 412: "changed", 416: "range", 429: "unavailable",
}  # fmt: skip
_NO_NETWORK = re.compile(r"provider: (?:EndpointConnection|Connect\w*|ReadTimeout)Error")
_PASSING = ("error sending request", "body error", "error decoding response", "timed out")
_WORDS: dict[Reason, str] = {
    "missing": "there is no such object; check the address",
    "no bucket": "there is no such bucket; check its name, and the endpoint if it is not a cloud's "
    "own (AWS_ENDPOINT_URL)",
    "denied": "permission denied; the credentials lack a right here, or are those of another "
    "account (or give --anonymous if it is public)",
    "credentials": "the store does not accept the credentials; check the environment or the "
    "profile they come from (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, "
    "AZURE_STORAGE_ACCOUNT_NAME, HF_TOKEN)",
    "expired": "the credentials have expired; log in again, and start again to continue",
    "exists": "there is an object already",
    "changed": "the object has changed meanwhile",
    "conflict": "others write to it all the time; try again later",
    "range": "the object is shorter than expected",
    "unsupported": "the server lacks what is needed here (ranges, or conditional writes)",
    "region": "the bucket lies in another region; set AWS_REGION to it",
    "unreachable": "the store cannot be reached (no connection); check the address, the endpoint "
    "(AWS_ENDPOINT_URL) and the network",
    "unavailable": "the store cannot be reached, or is too busy, after all retries; try again "
    "later, and check the endpoint and the network",
    "other": "the store refuses the request",
}


def reason_of(error: BaseException) -> Reason:
    """Return what an error of obstore means; "other" for errors of other libraries too."""
    if not is_of_obstore(error):
        return "other"
    text = str(error)
    status, code = _status(text), _code(text)
    if code in _OF_CODE:
        return _OF_CODE[code]
    if "External AWS credential provider" in text:  # botocore renews them, and failed to
        return "unavailable" if _NO_NETWORK.search(text) else "expired"
    if "performing token request" in text:  # of the machine's own account, for want of another
        return "credentials"
    if "specified bucket does not exist" in text:  # Google's words
        return "no bucket"
    if "kind: Connect" in text:
        return "unreachable"
    if status == 409:  # obstore calls it AlreadyExistsError, as a 412
        return "conflict"
    kind = _OF_TYPE.get(type(error).__name__)
    if kind is not None:
        return kind
    if status is not None:
        return "unavailable" if status >= 500 else _OF_STATUS.get(status, "other")
    if "redirect without LOCATION" in text:
        return "region"
    if "Range request not supported" in text:
        return "unsupported"
    return "unavailable" if any(words in text for words in _PASSING) else "other"


def explain(error: BaseException, place: Location | str) -> str:
    """Return one line on an error of obstore: the place, what is wrong, the way out."""
    text = str(error)
    details = [str(part) for part in (_status(text), _code(text)) if part]
    reason = reason_of(error)
    words = _WORDS[reason]
    if reason == "other" and "builder error" in text:
        words = "the endpoint is no valid address, or is http:// where https:// is needed"
    return f"{place}: {words}{f' (the answer was {chr(32).join(details)})' if details else ''}"


@contextmanager
def explained(place: Address | str, kind: type[GradprojError] = StoreError) -> Iterator[None]:
    """Raise errors of obstore in the body as errors of ``kind``, with one line and no secret."""
    try:
        yield
    except GradprojError:
        raise
    except Exception as error:
        if not is_of_obstore(error):
            raise
        # Not `from error`: its text may hold what was sent.
        raise kind(explain(error, place)) from None


def is_of_obstore(error: BaseException) -> bool:
    """Return True for errors that obstore raises; a missing object is a ``FileNotFoundError``."""
    if type(error).__module__.startswith("obstore"):
        return True
    return isinstance(error, FileNotFoundError) and error.errno is None and error.filename is None


def _status(text: str) -> int | None:
    match = _STATUS.search(text)
    return int(match[1] or match[2]) if match else None


def _code(text: str) -> str:
    match = _CODE.search(text)
    return (match[1] or match[2]) if match else ""
