"""Settings of the service, from environment variables and a YAML file.

Print the table of all settings, as bento/README.md has it: ``python -m patchcore_plugin.bento.settings``.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from bentoml.exceptions import BentoMLConfigException
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from patchcore_plugin.runtime.device import CPU, EXAMPLES, check_device
from patchcore_plugin.webhook import Receiver

from .hosts import split_host

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PREFIX = "PATCHCORE_"
FILE_VARIABLE = "PATCHCORE_SETTINGS"
"""Environment variable that names the YAML file of settings."""


class Settings(BaseSettings):
    """The settings of the service.

    A value comes from the first of these that has one: the arguments, the environment variable ``PATCHCORE_<NAME>``, the
    line ``<name>:`` of the YAML file that ``PATCHCORE_SETTINGS`` names, the default.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    bundle: Path | None = Field(None, description="Folder of the bundle to serve.")
    bundles: Path | None = Field(None, description="Folder of several bundles; the folder of each one is its name.")
    default_model: str | None = Field(None, description="Bundle for requests that name none, where there are several.")
    memory: int = Field(4096, ge=1, description="MiB of bundle files to keep loaded; the least recently used are dropped.")
    cache: Path | None = Field(None, description="Folder for compiled networks; if not set, a folder next to each bundle.")
    samples: Path | None = Field(None, description="Folder of sample images for the page /ui.")

    record: Path | None = Field(None, description="Folder of the [record](#record) of answers; none is kept if not set.")
    record_images: Literal["none", "not_normal", "all"] = Field(
        "not_normal", description="Images that the record keeps: none, those not called normal, or all."
    )
    record_days: float = Field(30, gt=0, le=36_500, description="Age up to which the record keeps answers, in days.")
    record_size: int = Field(
        2048, ge=64, le=2**24, description="Largest size of the record, in MiB; what is oldest is dropped."
    )

    mode: Literal["auto", "latency", "throughput"] = Field(
        "auto",
        description="latency: one image at a time, with all threads. throughput: as many images at once as threads. auto: "
        "an image that comes alone with all threads, several at once otherwise; latency for networks of more than 64 MiB.",
    )
    threads: int | None = Field(None, ge=1, le=1024, description="Threads for scoring; if not set, one for each core.")
    device: str = Field(
        CPU,
        description=f"Device of OpenVINO that computes networks: {EXAMPLES}. "
        "Another one than the CPU must give the scores of a bundle's self-test, or the bundle is refused.",
    )
    workers: int = Field(1, ge=1, le=256, description="Processes that answer requests.")
    runner: Literal["inside", "process"] = Field(
        "inside",
        description="Where images are scored: inside the process that answers, or in a process of their own; inside on "
        "Windows.",
    )
    runner_workers: int = Field(1, ge=1, le=256, description="With runner=process: processes that score.")
    max_batch_size: int = Field(8, ge=1, le=1024, description="With runner=process: largest number of images of a batch.")
    max_latency_ms: int = Field(
        10_000, ge=1, le=60_000, description="With runner=process: longest time of an image in the queue, in milliseconds."
    )

    queue: int = Field(
        32, ge=1, le=100_000, description="Largest number of requests at once for each worker; more are answered with 503."
    )
    timeout: float = Field(30, gt=0, le=3600, description="Longest time from a complete request to its answer, in seconds.")
    receive_timeout: float = Field(
        20,
        gt=0,
        le=3600,
        description="Longest time to wait for the head of a request, for its body, or for a client that reads no answer, in "
        "seconds.",
    )
    connections: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Largest number of connections for each worker; one more closes the one that waited longest.",
    )
    max_body: int = Field(64, ge=1, le=4096, description="Largest body of a request, in MiB.")
    max_pixels: int = Field(90_000_000, ge=1, le=10**9, description="Largest number of pixels of an image.")
    max_batch_pixels: int = Field(
        360_000_000, ge=1, le=10**10, description="Largest number of pixels of all images of a request to /predict_batch."
    )
    max_images: int = Field(32, ge=1, le=1024, description="Largest number of images of a request to /predict_batch.")

    host: str = Field(
        # Whoever starts a container of `bentoml containerize` decides which of its ports are open, and to whom.
        default_factory=lambda: "0.0.0.0" if "BENTOML_CONTAINERIZED" in os.environ else "127.0.0.1",  # noqa: S104
        description="Address to listen at: 127.0.0.1 serves this machine alone, 0.0.0.0 other hosts too (the default in a "
        "container).",
    )
    port: int = Field(3000, ge=1, le=65535, description="Port to listen at.")
    hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names, separated by commas, by which clients reach the service, beside those that it knows by itself "
        "([below](#who-is-answered)); `*` for any.",
    )
    api_key: SecretStr | None = Field(
        None, description="Key that requests must carry, as X-API-Key or Authorization: Bearer."
    )
    open_metrics: bool = Field(False, description="With api_key: whether /metrics is answered without the key.")
    webhook: SecretStr | None = Field(
        None, description="URL that is told of every image whose verdict is not normal ([below](#webhook))."
    )
    webhook_secret: SecretStr | None = Field(None, description="Secret that signs what it is told: `whsec_` and base64.")
    webhook_queue: Path | None = Field(
        None,
        validate_default=True,
        description="With webhook: file of what is yet to be told, on a disk of this computer.",
    )
    log: Literal["text", "json"] = Field("text", description="Form of a log line: text or json.")
    trace_to: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="URL of an OpenTelemetry collector (OTLP over HTTP, such as http://host:4318/v1/traces); needs the "
        "package opentelemetry-exporter-otlp-proto-http.",
    )
    trace_share: float = Field(1.0, gt=0, le=1, description="Share of requests that are traced.")

    @field_validator("bundles")
    @classmethod
    def _check_one_of_two(cls, bundles: Path | None, info: ValidationInfo) -> Path | None:
        if bundles is not None and info.data.get("bundle") is not None:
            msg = f"set either this or bundle, which is {info.data['bundle']}"
            raise ValueError(msg)
        return bundles

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        check_device(device)
        return device

    @field_validator("hosts", mode="before")
    @classmethod
    def _split_hosts(cls, hosts: Any) -> Any:
        names = hosts.split(",") if isinstance(hosts, str) else hosts
        return [name.strip() if isinstance(name, str) else name for name in names]

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        names = []
        for host in hosts:
            name, port = split_host(host) or (None, None)
            if name is None or port is not None:
                msg = f"must be names without scheme and port, such as line-7.example.com, got {host!r}"
                raise ValueError(msg)
            names.append(name)
        return tuple(names)

    @field_validator("webhook_queue")
    @classmethod
    def _check_webhook(cls, file: Path | None, info: ValidationInfo) -> Path | None:
        webhook, secret = info.data.get("webhook"), info.data.get("webhook_secret")
        if webhook is None and (file is not None or secret is not None):
            msg = "without webhook, there is nobody to tell"
            raise ValueError(msg)
        if webhook is not None and file is None:
            msg = "is missing: with webhook, name a file for the queue, such as /var/lib/patchcore/webhook.sqlite"
            raise ValueError(msg)
        return file

    @field_validator("webhook", "webhook_secret")
    @classmethod
    def _check_receiver(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None:  # the one beside it is right here, as each is looked at alone
            text, url = value.get_secret_value(), "http://127.0.0.1"
            _ = Receiver(text) if info.field_name == "webhook" else Receiver(url, text)
        return value

    @field_validator("trace_to")
    @classmethod
    def _check_exporter(cls, url: str | None) -> str | None:
        # No extra installs the exporter: without this check BentoML would fail later, with a traceback.
        try:
            if url is not None:
                import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        except ImportError as error:
            msg = "needs the package opentelemetry-exporter-otlp-proto-http, which is not installed"
            raise ValueError(msg) from error
        return url

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        **_: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The arguments, then the environment, then the file."""
        path = os.environ.get(FILE_VARIABLE)
        file = (YamlConfigSettingsSource(settings_cls, path, "utf-8"),) if path else ()
        return (init_settings, env_settings, *file)


def read_settings() -> Settings:
    """Read and check the settings of environment and file.

    Raises:
        BentoMLConfigException: If a setting has a wrong value or an unknown name; the message names the setting.
    """
    known = {FILE_VARIABLE, *(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        hint = f"Settings: {', '.join(sorted(known))}."
        if "PATCHCORE_SERVICE_HOST" in unknown:
            hint = (
                "Kubernetes sets them where a Service is called patchcore, unless the pod has `enableServiceLinks: false`."
            )
        msg = f"There is no setting {', '.join(unknown)}. {hint}"
        raise BentoMLConfigException(msg)
    path = os.environ.get(FILE_VARIABLE)
    if path and not Path(path).is_file():
        msg = f"{FILE_VARIABLE}: there is no file {path}."
        raise BentoMLConfigException(msg)
    try:
        return Settings()
    except ValidationError as error:
        msg = f"Wrong settings: {'; '.join(map(_describe, error.errors()))}."
        raise BentoMLConfigException(msg) from None
    except Exception as error:  # the YAML reader has errors of its own
        msg = f"{FILE_VARIABLE}: {path} cannot be read: {error}"
        raise BentoMLConfigException(msg) from error


def _describe(problem: ErrorDetails) -> str:
    """What is wrong with a setting; the value of a secret one is not shown."""
    if problem["type"] == "extra_forbidden":  # the environment's names have been checked
        known = ", ".join(Settings.model_fields)
        return f"{FILE_VARIABLE}: the file has {'.'.join(map(str, problem['loc']))}, which is no setting; settings: {known}"
    field = Settings.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    secret = field is not None and SecretStr in get_args(field.annotation)
    got = "" if secret or problem["input"] is None else f" (got {problem['input']!r})"
    return f"{PREFIX}{'.'.join(map(str, problem['loc'])).upper()}: {problem['msg'].rstrip('.')}{got}"


def settings_table() -> str:
    """The settings with defaults and meanings, as a Markdown table."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, ()) else f"`{default}`"
        rows.append(f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(settings_table())
