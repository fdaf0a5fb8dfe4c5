"""Where a user's services are: one small YAML file that `vitscale up` writes, or a person by hand.

    ray: http://ray-head.example:8265
    mlflow: https://mlflow.example
    data: s3://datasets
    runs: s3://training/runs
    s3_endpoint: https://s3.example        # leave out for AWS
    ray_token_file: ~/.ray/auth_token

No secret is ever in it, only paths of files that hold one. A relative path starts at the file's own folder.
"""

import difflib
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo

from workers.errors import ConfigError
from workers.storage import join_url

DEFAULT_SITE = Path(".vitscale/site.yaml")
FILES = (
    *("aws_config_file", "aws_credentials_file", "ray_token_file"),
    *("promotion_key_file", "promotion_public_key_file", "ca_file", "webhook_file", "wheel"),
)
"""Fields that name one."""
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE")
"""Of the clients of Ray and MLflow, of boto3, and of Python's own."""
HEADER = """\
# Where the services of this project are. `vitscale up` writes this file and keeps the fields that you add;
# for a cluster, write it by hand.
# No secret belongs in it: credentials are in the files that it names, or in your own AWS configuration.
"""


def _url(pattern: str, example: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if urlsplit(value).username is not None:
            raise ValueError("no user or password belongs in this address; name a file that holds it")
        if not re.match(pattern, value):
            raise ValueError(f"{value!r} is not an address of this kind; write one like {example}")
        return value.rstrip("/")

    return check


def _path(value: object, info: ValidationInfo) -> object:
    """A path as a person writes it: `~` is the home folder, relative to the site file's folder."""
    if not isinstance(value, str | Path):
        return value
    base = info.context["base"] if info.context else Path()
    return (base / Path(value).expanduser()).absolute()


ServerUrl = Annotated[str, AfterValidator(_url(r"https?://[^/\s]+", "http://127.0.0.1:8265"))]
TrackingUrl = Annotated[
    str, AfterValidator(_url(r"https?://[^/\s]+|sqlite:///[^\s]+", "https://mlflow.example:5000"))
]
StoreUrl = Annotated[
    str, AfterValidator(_url(r"s3://[^/\s]+|file:///[^\s]+", "s3://bucket/prefix or file:///absolute/path"))
]
FilePath = Annotated[Path, BeforeValidator(_path)]


class Site(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ray: ServerUrl
    """Ray's dashboard, which serves the Jobs API."""
    mlflow: TrackingUrl
    data: StoreUrl
    """Root of the data sets."""
    runs: StoreUrl
    """Root of checkpoints, leases and promotions; its store must create once atomically."""
    s3_endpoint: ServerUrl | None = None
    """An S3 server other than AWS."""
    s3_region: str | None = None
    """us-east-1 on a server other than AWS, which seldom looks at it; on AWS, what its configuration says."""
    aws_config_file: FilePath | None = None
    """In the format of ~/.aws/config; the `default` profile is used."""
    aws_credentials_file: FilePath | None = None
    """In the format of ~/.aws/credentials; the `default` profile is used. Without it: AWS's own chain."""
    ray_token_file: FilePath | None = None
    """Needed unless RAY_AUTH_TOKEN or ~/.ray/auth_token holds the cluster's token."""
    promotion_key_file: FilePath | None = None
    """Ed25519 private key with which this user signs promotions; only who promotes has one."""
    promotion_public_key_file: FilePath | None = None
    """Public keys of all who promote, in PEM; with it every reader refuses what none of them signed."""
    ca_file: FilePath | None = None
    """Certificates, in PEM, that vouch for these services instead of the usual authorities."""
    webhook_file: FilePath | None = None
    """Holds one https address, a secret, that is told when jobs are done, have failed or are stopped."""
    wheel: FilePath | None = None
    """vitscale as jobs bring it with them; without it they run what is installed on the nodes."""
    insecure: bool = False
    """Submit even to a Ray that asks for no token, or beyond the loopback without TLS."""
    autoscaling: bool = False
    """Ray adds nodes on demand: a job that is too large for those there are waits for more."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """ConfigError names the file and the field at fault."""
        try:
            data = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"no site file {path}: run `vitscale up` or write one (ray, mlflow, data, runs)"
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} is not a mapping of fields such as `ray: http://127.0.0.1:8265`")
        try:
            site = cls.model_validate(data, context={"base": path.parent.absolute()})
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(path, item) for item in error.errors())) from None
        for field in FILES:
            _check_file(path, field, getattr(site, field))
        return site

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        fields = {name: value if value is True else str(value) for name, value in self if value}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".site-")
        with os.fdopen(handle, "w") as file:
            file.write(HEADER + yaml.safe_dump(fields, sort_keys=False))
        Path(temporary).replace(path)

    def data_url(self, name: str) -> str:
        """Of a data set: a URL is one already, a name starts at the data root."""
        return name if "://" in name else join_url(self.data, name)

    def settings(self) -> dict[str, str]:
        """Environment of whoever uses these services, jobs too: no secret, and no path of this machine."""
        settings = {
            "MLFLOW_TRACKING_URI": self.mlflow,
            # Nothing here has MLflow load a model, which runs its code; 3.17 has the first of these switches.
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            # The default of 7 blocks for minutes; whoever talks to MLflow here comes again by itself.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        }
        region = self.s3_region
        if self.s3_endpoint is not None:
            region = region or "us-east-1"
            settings |= {
                "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
                "MLFLOW_S3_ENDPOINT_URL": self.s3_endpoint,
            }
        if region is not None:
            # botocore reads AWS_DEFAULT_REGION, every other SDK AWS_REGION.
            settings |= {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}
        return settings

    def environment(self) -> dict[str, str]:
        """What makes boto3, MLflow's client and Ray find these services, on top of a process's own.

        Where the site names a credentials file or a token file, variables that would take precedence over it
        are set empty: keys for AWS that lie in a user's shell do not reach the local object store.
        """
        environment = self.settings()
        if self.ca_file is not None:
            environment |= dict.fromkeys(CA_VARIABLES, str(self.ca_file))
        if self.aws_config_file is not None:
            environment["AWS_CONFIG_FILE"] = str(self.aws_config_file)
        if self.aws_credentials_file is not None:
            environment |= {
                "AWS_SHARED_CREDENTIALS_FILE": str(self.aws_credentials_file),
                "AWS_PROFILE": "default",
                "AWS_DEFAULT_PROFILE": "default",
                "AWS_ACCESS_KEY_ID": "",
                "AWS_SECRET_ACCESS_KEY": "",
                "AWS_SESSION_TOKEN": "",
            }
        if self.ray_token_file is not None:
            environment |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.ray_token_file),
                "RAY_AUTH_TOKEN": "",
            }
        return environment


def find_site(explicit: Path | None) -> Path:
    """The file named on the command line, else `.vitscale/site.yaml` below the current folder."""
    path = DEFAULT_SITE if explicit is None else explicit
    if not path.is_file():
        where = f"no site file {path}" if explicit else f"no site file {DEFAULT_SITE} in {Path.cwd()}"
        raise ConfigError(f"{where}: run `vitscale up` here, or write one for your cluster and name it")
    return path


def _explain(path: Path, error: Any) -> str:
    field = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, Site.model_fields, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known fields: {', '.join(Site.model_fields)}"
        return f"{path}: unknown field `{field}`; {hint}"
    if error["type"] == "missing":
        return f"{path}: field `{field}` is missing"
    return f"{path}: field `{field}`: {error['msg'].removeprefix('Value error, ')}"


def _check_file(path: Path, field: str, file: Path | None) -> None:
    if file is None:
        return
    if not file.is_file():
        raise ConfigError(f"{path}: field `{field}`: there is no file {file}")
    mode = file.stat().st_mode
    if field == "promotion_key_file" and mode & (stat.S_IRWXO | stat.S_IRWXG):
        raise ConfigError(f"{path}: field `{field}`: others can read {file}; run `chmod 600 {file}`")
    # Group bits are left alone: Kubernetes mounts a pod's secrets as root:fsGroup 0440.
    if field in ("aws_credentials_file", "ray_token_file", "webhook_file") and mode & stat.S_IRWXO:
        raise ConfigError(f"{path}: field `{field}`: everybody can read {file}; run `chmod 600 {file}`")
