"""Checks whether the credentials last as long as the run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from emotion_train.config import Config
from emotion_train.errors import WrongRequest
from emotion_train.storage.s3_errors import refusal

# providers of boto3 that renew a credential by themselves, as long as the machine or the login
# lasts
_RENEWED = (
    "iam-role",
    "container-role",
    "assume-role",
    "assume-role-with-web-identity",
    "custom-process",
    "sso",
    "login",
)


def check_credentials(config: Config, hours: Callable[[], float | None]) -> str:
    """The finding on boto3's credentials: they exist, and outlast the run where their end is
    known.
    """
    if not any(
        url.strip().lower().startswith("s3:")
        for url in (config.data.url, config.run.output_url, config.model.base, config.run.kernels_url or "")
    ):
        return "none needed: data and output are folders"
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        found = boto3.Session().get_credentials()
        token = found.get_frozen_credentials().token if found is not None else None
    except BotoCoreError as error:
        raise WrongRequest(
            f"The credentials for the bucket cannot be read ({error}); type `aws sso login` or set"
            " AWS_PROFILE."
        ) from None
    except Exception as error:  # a file or a number of the settings
        raise WrongRequest(refusal("the bucket", error)) from None
    if found is None:
        raise WrongRequest(
            "There are no credentials for the bucket: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
            " AWS_PROFILE, or type `aws configure`."
        )
    ends: datetime | None = getattr(found, "_expiry_time", None)
    return _lasting(str(found.method), ends, token is not None, hours, datetime.now(UTC))


def _lasting(
    method: str, ends: datetime | None, temporary: bool, planned: Callable[[], float | None], now: datetime
) -> str:
    """How long a credential lasts, in words; raises `WrongRequest` when it ends within the run and
    nothing renews it.
    """
    if ends is None and not temporary:
        return f"from {method}, without an end"
    hours = planned()
    run = f" and the run takes {hours:.1f} hours" if hours is not None else ""
    if ends is None:
        return (
            f"from {method}, with a session token whose end is not known{run}: a role of the machine is safer"
        )
    left = (ends - now).total_seconds() / 3600
    if method in _RENEWED:
        return f"from {method}, renewed by itself (this one ends in {left:.1f} hours)"
    if left <= (hours or 0.0):
        raise WrongRequest(
            f"The credentials from {method} end in {left:.1f} hours{run}; renew them, or give the machine a"
            " role of its own, which is renewed by itself."
        )
    return f"from {method}, for {left:.1f} more hours{run}"
