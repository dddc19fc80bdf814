"""Settings of the service, from environment and file."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from bentoml.exceptions import BentoMLConfigException
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

PREFIX = "PATCHCORE_"
FILE = "PATCHCORE_SETTINGS"
"""Environment variable that names a YAML file of settings; the environment goes before it."""


class Settings(BaseSettings):
    """What may be set, by the environment variable ``PATCHCORE_<NAME>`` or by a line of the YAML file."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    bundle: Path | None = Field(None, description="Folder of the bundle to serve.")
    bundles: Path | None = Field(None, description="Folder of several bundles, each named by its own folder.")
    default_model: str | None = Field(None, description="Bundle for requests that name none, where there are several.")
    memory: int = Field(4096, ge=1, description="MiB of bundles to keep loaded; the least recently used give way.")
    cache: Path | None = Field(None, description="Folder for compiled networks; next to each bundle if not given.")
    samples: Path | None = Field(None, description="Folder of images to pick from on the page /ui.")

    mode: Literal["latency", "throughput"] = Field(
        "latency", description="latency: one image with all threads; throughput: as many images at once as threads."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="Threads to compute with; all cores if not given.")
    workers: int = Field(1, ge=1, le=256, description="Processes that answer requests.")
    runner: Literal["inside", "process"] = Field(
        "inside", description="Where networks run: in the process that answers, or in one of their own."
    )
    runner_workers: int = Field(1, ge=1, le=256, description="runner=process: how many.")
    max_batch_size: int = Field(8, ge=1, le=1024, description="runner=process: images in a batch, at most.")
    max_latency_ms: int = Field(10_000, ge=1, le=60_000, description="runner=process: time in its queue, at most.")

    queue: int = Field(32, ge=1, le=100_000, description="Requests at once, per worker; others are answered 503.")
    timeout: float = Field(30, gt=0, le=3600, description="Seconds for a request, from its first byte to its answer.")
    max_body: int = Field(64, ge=1, le=4096, description="MiB of a request's body, at most.")
    max_pixels: int = Field(90_000_000, ge=1, le=10**9, description="Pixels of an image, at most.")
    max_images: int = Field(32, ge=1, le=1024, description="Images of one request to /predict_batch, at most.")

    host: str = Field(
        # in a container of `bentoml containerize`, whoever starts it says which of its ports are open to whom
        default_factory=lambda: "0.0.0.0" if "BENTOML_CONTAINERIZED" in os.environ else "127.0.0.1",  # noqa: S104
        description="Address to listen at: this machine alone; 0.0.0.0 for other hosts too.",
    )
    port: int = Field(3000, ge=1, le=65535, description="Port to listen at.")
    api_key: SecretStr | None = Field(None, description="Requests must carry it in the header X-API-Key.")
    log: Literal["text", "json"] = Field("text", description="Form of the log's lines.")
    trace_to: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Address that OpenTelemetry spans are sent to (OTLP over HTTP, http://host:4318/v1/traces); needs the "
        "package opentelemetry-exporter-otlp-proto-http.",
    )
    trace_share: float = Field(1.0, gt=0, le=1, description="Share of requests that are traced.")

    @field_validator("bundles")
    @classmethod
    def _one_of_two(cls, bundles: Path | None, info: ValidationInfo) -> Path | None:
        if bundles is not None and info.data.get("bundle") is not None:
            msg = f"set either this or bundle, which is {info.data['bundle']}"
            raise ValueError(msg)
        return bundles

    @field_validator("trace_to")
    @classmethod
    def _exporter_is_there(cls, address: str | None) -> str | None:
        try:
            if address is not None:
                import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        except ImportError as error:
            msg = "needs the package opentelemetry-exporter-otlp-proto-http, which is not installed"
            raise ValueError(msg) from error
        return address

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], env_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment, then the file."""
        path = os.environ.get(FILE)
        return (env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)) if path else (env_settings,)


def read_settings() -> Settings:
    """Read and check the settings.

    Raises:
        BentoMLConfigException: If one has a wrong value or an unknown name; the message says which.
    """
    known = {FILE, *(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        msg = f"There is no setting {', '.join(unknown)}. Settings: {', '.join(sorted(known))}."
        raise BentoMLConfigException(msg)
    path = os.environ.get(FILE)
    if path and not Path(path).is_file():
        msg = f"{FILE}: there is no file {path}."
        raise BentoMLConfigException(msg)
    try:
        return Settings()
    except ValidationError as error:
        wrong = [
            f"{PREFIX}{'.'.join(map(str, problem['loc'])).upper()}: {problem['msg']} (got {problem['input']!r})"
            for problem in error.errors()
        ]
        msg = f"Wrong settings: {'; '.join(wrong)}."
        raise BentoMLConfigException(msg) from None
    except Exception as error:  # the file's reader raises its own
        msg = f"{FILE}: {path} cannot be read: {error}"
        raise BentoMLConfigException(msg) from error
