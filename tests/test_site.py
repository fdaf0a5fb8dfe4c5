from pathlib import Path

import pytest

from orchestrator.site import Site, find_site
from workers.errors import ConfigError

MINIMAL = """\
ray: http://head.example:8265
mlflow: https://mlflow.example
data: s3://datasets/
runs: s3://training/runs
"""
EXPORTED = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def write(folder: Path, text: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def secret_file(path: Path, text: str = "x") -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def test_a_site_written_by_hand_needs_four_fields(tmp_path):
    site = Site.load(write(tmp_path, MINIMAL))
    assert site == Site(
        ray="http://head.example:8265",
        mlflow="https://mlflow.example",
        data="s3://datasets",
        runs="s3://training/runs",
    )
    assert site.environment() == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }


def test_what_is_saved_comes_back(tmp_path):
    site = Site(
        ray="http://127.0.0.1:8265",
        mlflow="http://127.0.0.1:5050",
        data="s3://vitscale",
        runs=(tmp_path / "with space").as_uri(),
        s3_endpoint="http://127.0.0.1:9000",
        aws_config_file=secret_file(tmp_path / "config"),
        aws_credentials_file=secret_file(tmp_path / "credentials"),
        ray_token_file=secret_file(tmp_path / "token"),
    )
    site.save(tmp_path / "site.yaml")
    assert Site.load(tmp_path / "site.yaml") == site
    assert (tmp_path / "site.yaml").stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config", "credentials", "site.yaml", "token"]


def test_paths_start_at_the_file_and_know_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    secret_file(tmp_path / "token")
    secret_file(tmp_path / "keys")
    path = write(tmp_path, MINIMAL + "ray_token_file: ~/token\naws_credentials_file: keys\n")
    monkeypatch.chdir("/")
    site = Site.load(path)
    assert site.ray_token_file == tmp_path / "token"
    assert site.aws_credentials_file == tmp_path / "keys"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rays: http://x\n", "unknown field `rays`; did you mean `ray`?"),
        ("password: x\n", "unknown field `password`; known fields: ray, mlflow, data, runs, s3_endpoint"),
        ("ray: 8265\n", "field `ray`: Input should be a valid string"),
        ("ray: head.example\n", "field `ray`: 'head.example' is not an address of this kind"),
        ("mlflow: https://me:secret@mlflow.example\n", "field `mlflow`: no user or password belongs"),
        ("data: /data\n", "write one like s3://bucket/prefix or file:///absolute/path"),
        ("runs: file://data\n", "field `runs`: 'file://data' is not an address of this kind"),
        ("ray_token_file: 7\n", "field `ray_token_file`"),
        ("ray_token_file: gone\n", "field `ray_token_file`: there is no file"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, change, message):
    kept = [line for line in MINIMAL.splitlines(True) if line.split(":")[0] != change.split(":")[0]]
    path = write(tmp_path, "".join(kept) + change)
    with pytest.raises(ConfigError) as caught:
        Site.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_every_missing_field_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"`data` is missing\n.*`runs` is missing"):
        Site.load(write(tmp_path, "ray: http://x\nmlflow: http://x\n"))


@pytest.mark.parametrize("text", ["", "- a\n", "ray: [\n", "\xff\x00"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "site.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"site\.yaml"):
        Site.load(path)


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="run `vitscale up`"):
        Site.load(tmp_path / "site.yaml")


def test_a_secret_that_everybody_can_read_is_refused(tmp_path):
    token = secret_file(tmp_path / "token")
    path = write(tmp_path, MINIMAL + "ray_token_file: token\n")
    token.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {token}"):
        Site.load(path)
    token.chmod(0o440)
    assert Site.load(path).ray_token_file == token


def test_the_environment_leads_clients_to_the_site_and_nowhere_else(tmp_path, monkeypatch):
    import boto3

    for name in EXPORTED:
        monkeypatch.setenv(name, "of-another-store")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    secret_file(tmp_path / "config", "[default]\ns3 =\n    addressing_style = path\n")
    secret_file(tmp_path / "keys", "[default]\naws_access_key_id = me\naws_secret_access_key = mine\n")
    site = Site(
        ray="http://127.0.0.1:8265",
        mlflow="http://127.0.0.1:5050",
        data="s3://vitscale",
        runs="file:///runs",
        s3_endpoint="http://127.0.0.1:9000",
        aws_config_file=tmp_path / "config",
        aws_credentials_file=tmp_path / "keys",
        ray_token_file=tmp_path / "token",
    )
    environment = site.environment()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert environment["MLFLOW_S3_ENDPOINT_URL"] == "http://127.0.0.1:9000"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    session = boto3.session.Session()
    assert session.client("s3").meta.endpoint_url == "http://127.0.0.1:9000"
    assert session.region_name == "us-east-1"
    keys = session.get_credentials()
    assert (keys.access_key, keys.secret_key, keys.token) == ("me", "mine", None)


def test_a_region_of_its_own_is_passed_on():
    site = Site(
        ray="http://x",
        mlflow="http://x",
        data="s3://b",
        runs="s3://c",
        s3_endpoint="http://y",
        s3_region="garage",
    )
    assert site.environment()["AWS_REGION"] == site.environment()["AWS_DEFAULT_REGION"] == "garage"


def test_the_site_file_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"\.vitscale/site\.yaml in {tmp_path}: run `vitscale up` here"):
        find_site(None)
    with pytest.raises(ConfigError, match=r"no site file other\.yaml"):
        find_site(Path("other.yaml"))
    (tmp_path / ".vitscale").mkdir()
    write(tmp_path / ".vitscale", MINIMAL)
    other = write(tmp_path, MINIMAL)
    assert find_site(None) == Path(".vitscale/site.yaml")
    assert find_site(other) == other
